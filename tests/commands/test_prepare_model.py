"""Any start -> MiMo layout: the same logits, a whole head, a refusal for what the layout cannot express."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import chatml_tokenizer, save_folder, save_released
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastmtp import files
from fastmtp.checkpoint import HEAD_TENSORS
from fastmtp.cli import InputError
from fastmtp.head.modeling_mimo import MiMoForCausalLM
from fastmtp.prepare_model import prepare
from fastmtp.reference.model import load

SHAPE = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    eos_token_id=2,
)
IDS = torch.arange(7, 90)[None]


def save_source(folder: Path, model, dtype=torch.float32) -> Path:
    """A checkpoint as others publish it, biases and norms made random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(folder)
    chatml_tokenizer().save_pretrained(folder)
    return folder


SOURCES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_theta=5e5, tie_word_embeddings=False)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama head_dim": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False)),
    "qwen2 tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_logits_are_the_sources(name, tmp_path):
    torch.manual_seed(0)
    source = save_source(tmp_path / "source", SOURCES[name]())
    prepare(str(source), tmp_path / "out")
    model = load(tmp_path / "out")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(input_ids=IDS).logits
        logits = model.net(input_ids=IDS).logits
        assert torch.equal(logits, expected) and expected.std() > 0.1
        _, states, _ = model.net.mtp_states(IDS, num_steps=3)
    assert all(torch.isfinite(state).all() for state in states)
    assert model.eos_ids == {2} and model.tokenizer.chat_template
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() >= HEAD_TENSORS and "lm_head.weight" in written
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == name.split()[0] and config["tie_word_embeddings"] is False


def test_the_fresh_head_is_the_last_layer(tmp_path):
    source = save_source(tmp_path / "source", SOURCES["qwen2"]())
    prepare(str(source), tmp_path / "out", "bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    head, last = "model.mtp_layers.0.", "model.layers.2."
    for name in ("self_attn.q_proj.bias", "mlp.up_proj.weight", "input_layernorm.weight"):
        assert torch.equal(tensors[head + name], tensors[last + name])
    for name in (
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    ):  # the same layer, its part of the sum damped
        ratio = tensors[head + name].float().norm() / tensors[last + name].float().norm()
        assert 0 < ratio <= 1 and torch.allclose(
            tensors[head + name].float(), ratio * tensors[last + name].float(), 0.02
        )


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=48, n_layer=1, n_head=4)), "gpt2"),
        (lambda: MistralForCausalLM(MistralConfig(**SHAPE)), "mistral"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)), "output-projection"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, mlp_bias=True)), "mlp_bias"),
        (
            lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8)),
            "use_sliding_window",
        ),
    ],
    ids=["gpt2", "mistral", "output bias", "mlp bias", "sliding window"],
)
def test_other_types_are_refused_and_nothing_written(make, match, tmp_path):
    source = save_source(tmp_path / "source", make())
    with pytest.raises(InputError, match=match) as error:
        prepare(str(source), tmp_path / "out")
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["source"]


def test_missing_and_empty_sources_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "none.gguf", "empty"):
        with pytest.raises(InputError, match=name):
            prepare(str(tmp_path / name), tmp_path / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(InputError, match="bad"):
        prepare(str(tmp_path / "bad"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_the_output(tmp_path):
    source = save_source(tmp_path / "source", SOURCES["llama"]())
    with pytest.raises(InputError, match="new folder"):
        prepare(str(source), source)
    assert "config.json" in {p.name for p in source.iterdir()} and not (source / "run.json").exists()


@pytest.mark.parametrize(
    "template, note",
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system') if messages[0]['role'] == 'system' }}", "no system turn"),
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", "no system turn"),
    ],
    ids=["none", "refused", "dropped"],
)
def test_a_source_that_cannot_chat_is_prepared_with_a_note(template, note, tmp_path, capsys):
    source = save_source(tmp_path / "source", SOURCES["llama"]())
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    (source / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(source)
    prepare(str(source), tmp_path / "out")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and note in notes[0] and str(source) in notes[0]
    assert load(tmp_path / "out").tokenizer.chat_template == template


def test_an_output_that_is_not_ours_is_refused_before_the_work(tmp_path, monkeypatch):
    source = save_source(tmp_path / "source", SOURCES["llama"]())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    monkeypatch.setattr("fastmtp.prepare_model.locate", lambda name: pytest.fail("the source was fetched"))
    with pytest.raises(InputError, match="other files"):
        prepare(str(source), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """Whether a library's words or the system's own error come back."""
    folder = save_released(tmp_path / "mimo")
    source = save_source(tmp_path / "source", SOURCES["llama"]())

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(MiMoForCausalLM, "save_pretrained", full)
    with pytest.raises(InputError, match="disk is full"):
        prepare(str(source), tmp_path / "out")

    def none_left(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastmtp.prepare_model.copy", none_left)
    with pytest.raises(InputError, match="disk is full"):
        prepare(str(folder), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "mimo"}


def test_a_kill_leaves_no_folder_that_looks_whole(tmp_path):
    source = save_source(tmp_path / "source", SOURCES["llama"]())
    code = (
        "import os, signal, fastmtp.prepare_model as p\n"
        "def last(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"p.finish_folder = last\np.prepare({str(source)!r}, {str(tmp_path / 'out')!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    (left,) = tmp_path.glob(".out.*.tmp")
    alive = tmp_path / f".out.{os.getppid()}.old"  # its process still writes
    mine = tmp_path / ".out.0123.tmp", tmp_path / ".out.tmp", tmp_path / f".outer{left.name[4:]}"
    for path in (alive, *mine):
        path.write_text("x")
    prepare(str(source), tmp_path / "out")
    assert load(tmp_path / "out").eos_ids == {2}
    assert not left.exists() and all(path.exists() for path in (alive, *mine))


def test_a_folder_that_a_killed_run_was_replacing_comes_back(tmp_path):
    source = save_source(tmp_path / "source", SOURCES["llama"]())
    prepare(str(source), tmp_path / "out")
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "out").rename(tmp_path / f".out.{dead.pid}.old")
    (tmp_path / f".out.{dead.pid}.tmp").mkdir()
    with pytest.raises(ZeroDivisionError), files.atomic(tmp_path / "out"):
        _ = 1 / 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert load(tmp_path / "out").eos_ids == {2}


def doubled(folder: Path, config: dict) -> None:
    config["num_nextn_predict_layers"] = 2


def quantised_elsewhere(folder: Path, config: dict) -> None:
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')


def tied_to_another(folder: Path, config: dict) -> None:
    config["tie_word_embeddings"] = True


def wrong_number(folder: Path, config: dict) -> None:
    config["rms_norm_eps"] = "1e-6"


@pytest.mark.parametrize(
    "change, words",
    [
        (doubled, "num_nextn_predict_layers is 2"),
        (quantised_elsewhere, "hf_quant_config.json"),
        (tied_to_another, "ties lm_head.weight"),
        (wrong_number, "config.json|rms_norm_eps"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_files_that_contradict_each_other_are_refused(change, words, plain, tmp_path, capsys):
    if plain and change is doubled:
        pytest.skip("a plain model has no such key")
    source = tmp_path / "source"
    save_source(source, SOURCES["llama"]()) if plain else save_folder(source)
    config = json.loads((source / "config.json").read_text())
    change(source, config)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words) as error:
        prepare(str(source), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert "warning" not in capsys.readouterr().err  # one line is all
