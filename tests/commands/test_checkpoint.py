"""Weights that are not whole, not finite or not a model's are refused in one line; nothing is made up."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.tiny import chatml_tokenizer, save_folder
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastmtp import checkpoint
from fastmtp.checkpoint import check_weights, copy, finish_folder, read_head
from fastmtp.cli import InputError
from fastmtp.export import export
from fastmtp.formats.weights import INDEX, headers
from fastmtp.prepare_model import prepare
from fastmtp.tokenizer import load_tokenizer

SHAPE = tiny.SHAPE | dict(vocab_size=320, max_position_embeddings=128)
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    for name, model, shards in (
        ("llama", LlamaForCausalLM(LlamaConfig(**SHAPE)), "50GB"),
        ("qwen2", Qwen2ForCausalLM(Qwen2Config(**SHAPE)), "50GB"),
        ("shards", LlamaForCausalLM(LlamaConfig(**SHAPE)), "60KB"),
    ):
        model.save_pretrained(root / name, max_shard_size=shards)
        chatml_tokenizer().save_pretrained(root / name)
    save_folder(root / "mimo")
    return root


def weights(change):
    """A damage to the tensors of model.safetensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        result = change(tensors)
        save_file(tensors if result is None else result, folder / "model.safetensors", {"format": "pt"})

    return damage


def without(name: str):
    return lambda tensors: {n: tensor for n, tensor in tensors.items() if n != name}


def settings(**values):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def replaced(content: bytes):
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def index_of_the_first_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file == first}
    (folder / INDEX).write_text(json.dumps(index))


def not_finite(name: str, value: float):
    return weights(lambda t: t[name].view(-1)[7:8].fill_(value) and None)


def fp8(tensors: dict) -> None:
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)
    tensors[f"{UP}_scale_inv"] = torch.ones(1, 1)


def gptq(tensors: dict) -> None:
    name = UP.removesuffix("weight")
    del tensors[UP]
    tensors |= {f"{name}qweight": torch.zeros(6, 64, dtype=torch.int32), f"{name}scales": torch.ones(1, 64)}


def torn_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


QUANTISED = {"quant_method": "fp8"}
DAMAGE = {  # source folder, damage, what the one line names
    "a tensor gone": ("llama", weights(without(UP)), UP),
    "a bias gone": (
        "qwen2",
        weights(without("model.layers.0.self_attn.k_proj.bias")),
        "k_proj.bias",
    ),
    "no output matrix": ("llama", weights(without("lm_head.weight")), "lm_head.weight"),
    "foreign prefix": (
        "llama",
        weights(lambda t: {f"base_model.{n}": v for n, v in t.items()}),
        "base_model.",
    ),
    "prefix of an image model": (
        "qwen2",
        weights(lambda t: {n.replace("model.", "model.language_model.", 1): v for n, v in t.items()}),
        "language_model",
    ),
    "an adapter beside it": (
        "llama",
        weights(lambda t: t | {UP.replace("weight", "lora_A"): torch.ones(2)}),
        "lora_A",
    ),
    "more layers than said": ("llama", settings(num_hidden_layers=1), "model.layers.1"),
    "fewer layers than said": ("llama", settings(num_hidden_layers=3), "model.layers.2"),
    "a shape turned": ("llama", weights(lambda t: t | {UP: t[UP].T.contiguous()}), UP),
    "another vocabulary": ("qwen2", settings(vocab_size=321), "embed_tokens"),
    "no hidden size": ("llama", settings(hidden_size=None), "hidden_size"),
    "FP8, not said": ("llama", weights(fp8), UP),
    "FP8, said": ("llama", both(weights(fp8), settings(quantization_config=QUANTISED)), "fp8"),
    "GPTQ, not said": ("llama", weights(gptq), "qweight"),
    "double precision": ("llama", weights(lambda t: t | {UP: t[UP].double()}), UP),
    "quantised MiMo": ("mimo", settings(quantization_config=QUANTISED), "fp8"),
    "quantised MiMo, not said": ("mimo", weights(fp8), UP),
    "MiMo with a tensor gone": ("mimo", weights(without(UP)), UP),
    "MiMo, not finite": ("mimo", not_finite(UP, float("nan")), UP),
    "not a number": ("llama", not_finite(UP, float("nan")), UP),
    "infinite": ("qwen2", not_finite("model.norm.weight", float("inf")), "model.norm.weight"),
    "index of the first shard": ("shards", index_of_the_first_shard, "missing"),
    "a shard gone": (
        "shards",
        lambda f: sorted(f.glob("*.safetensors"))[1].unlink(),
        "model-00002",
    ),
    "index of nothing": ("shards", torn_index, "weight_map"),
    "pickles alone": ("llama", pickled, "pytorch_model.bin"),
    "torn": ("llama", cut, "torn"),
    "empty": ("llama", replaced(b""), "torn"),
    "git-lfs": ("llama", replaced(b"version https://git-lfs.github.com/spec/v1\nsize 3\n"), "git-lfs"),
    "a web page": ("llama", replaced(b"<!DOCTYPE html><html></html>"), "HTML"),
    "other bytes": ("llama", replaced(bytes(range(256)) * 9), "torn"),
    "a classifier": ("llama", settings(architectures=["LlamaForSequenceClassification"]), "Classification"),
    "another model": ("llama", settings(model_type="gemma"), "gemma"),
    "another activation": ("llama", settings(hidden_act="gelu"), "hidden_act"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_source_is_refused_and_nothing_written(name, sources, tmp_path):
    kind, damage, match = DAMAGE[name]
    source = tmp_path / "source"
    shutil.copytree(sources / kind, source)
    damage(source)
    with pytest.raises(InputError, match=match) as error:
        prepare(str(source), tmp_path / "out")
    assert "\n" not in str(error.value) and str(source) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", [name for name in DAMAGE if DAMAGE[name][0] == "mimo"])
def test_a_damaged_base_is_refused_and_nothing_written(name, sources, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(sources / "mimo", base)
    DAMAGE[name][1](base)
    with pytest.raises(InputError, match=DAMAGE[name][2]):
        export(base, sources / "mimo", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_weights_are_refused_before_they_are_loaded(sources, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("fastmtp.prepare_model.AutoModelForCausalLM.from_pretrained", loaded)
    monkeypatch.setattr(checkpoint, "read_tensors", loaded)
    for name in ("a tensor gone", "FP8, said", "torn", "a classifier", "quantised MiMo"):
        source = tmp_path / name.replace(" ", "-")
        shutil.copytree(sources / DAMAGE[name][0], source)
        DAMAGE[name][1](source)
        with pytest.raises(InputError):
            prepare(str(source), tmp_path / "out")


def test_whole_folders_pass(sources, tmp_path):
    for name in ("llama", "qwen2", "shards", "mimo"):
        assert check_weights(sources / name)["model.norm.weight"].shape == (64,)
    tied = LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": True}))
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in headers(tmp_path / "tied")
    check_weights(tmp_path / "tied")


def test_a_head_that_does_not_fit_is_refused(sources, tmp_path):
    head = read_head(sources / "mimo")
    name = "model.mtp_layers.0.input_proj.weight"
    cases = {
        "nan": (head | {name: head[name] * torch.nan}, "not finite"),
        "dtype": (head | {name: head[name].to(torch.float64)}, "F64"),
        "shape": (head | {name: head[name][:, :64].contiguous()}, "input_proj"),
        "more": (head | {"model.mtp_layers.1.input_proj.weight": head[name].clone()}, "mtp_layers.1"),
    }
    for case, (tensors, match) in cases.items():
        (tmp_path / case).mkdir()
        save_file(tensors, tmp_path / case / "model.safetensors")
        with pytest.raises(InputError, match=match):
            export(sources / "mimo", tmp_path / case, tmp_path / "out")
        with pytest.raises(InputError):
            prepare(str(sources / "llama"), tmp_path / "out", head=str(tmp_path / case))
    assert not (tmp_path / "out").exists()


def test_a_head_too_large_for_the_bases_dtype_is_refused(tmp_path):
    base = save_folder(tmp_path / "base", dtype=torch.float16)
    head = {name: tensor.float() for name, tensor in read_head(base).items()}
    head["model.mtp_layers.0.input_proj.weight"][0, 0] = 1e6
    (tmp_path / "head").mkdir()
    save_file(head, tmp_path / "head" / "model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        export(base, tmp_path / "head", tmp_path / "out")


def test_a_copy_is_nobody_elses(tmp_path):
    (tmp_path / "a").write_bytes(b"weights")
    copy(tmp_path / "a", tmp_path / "b")
    with (tmp_path / "b").open("r+b") as file:
        file.write(b"W")
    assert (tmp_path / "a").read_bytes() == b"weights" and (tmp_path / "b").read_bytes() == b"Weights"


def test_outputs_share_no_file_with_their_inputs(sources, tmp_path):
    prepare(str(sources / "mimo"), tmp_path / "base")
    export(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    inodes = [
        path.stat().st_ino
        for f in (sources / "mimo", tmp_path / "base", tmp_path / "out")
        for path in f.iterdir()
    ]
    assert len(inodes) == len(set(inodes))


def messages(folder: Path) -> list[str]:
    """What transformers warns of when it reads the tokenizer of `folder`."""
    lines, logger = [], logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)  # another test may have asked for silence
    try:
        load_tokenizer(folder)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    return lines


def test_a_large_tokenizer_is_not_taken_for_a_broken_one_of_mistral(tmp_path):
    """transformers asks config.json which version wrote the folder, and warns if there is none."""
    folder = save_folder(tmp_path / "model")
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    stored["model"]["vocab"] |= {f"word{n}": 1000 + n for n in range(100_001)}
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for version in ("4.40.1", None):
        finish_folder(folder, config | {"transformers_version": version})
        assert not messages(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del written["transformers_version"]
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert any("regex" in line for line in messages(folder)), "the test has lost its point"
