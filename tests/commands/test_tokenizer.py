"""A written folder reads a text as its source does, whoever loads it."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.tiny import save_folder
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastmtp.cli import InputError
from fastmtp.export import export
from fastmtp.prepare_model import prepare
from fastmtp.tokenizer import PROBES, different, from_file, load_tokenizer, loses_text, own_tokenizer

SHAPE = tiny.SHAPE | dict(vocab_size=512, num_hidden_layers=1, max_position_embeddings=128)
TEXTS = (
    "we counted 10 and 2024 apples",
    " one\n\n\ttwo   three \n",
    "don't say I'LL",
    "今天 é 🙂",
    "<|end|>x <|end|>",
    *PROBES,
)
RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pre, normalizer=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["in 2024 we counted 2024 apples and 1000 pears, don't we?"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def gpt2_rule():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def digits_alone():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_rule()])


def split(digits: str):
    rule = pre_tokenizers.Split(Regex(RULE.replace("DIGITS", digits)), "isolated")
    return pre_tokenizers.Sequence([rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(legacy: bool | None = None):
    """Byte fallback and U+2581 for a space; as a plain tokenizer.json, or as transformers' LlamaTokenizer."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for letter in "▁abcdefghijklmnopqrstuvwxyz,.0123456789'":
        vocab.setdefault(letter, len(vocab))
    merges = [("▁", "w"), ("▁w", "e"), ("e", "d")]
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    if legacy is not None:
        return LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy)
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def with_added_tokens():
    tokenizer = byte_level(digits_alone())
    tokenizer.add_tokens(["two apples", AddedToken("<tool>", lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


def source_folder(folder: Path, kind: str, tokenizer, **settings) -> Path:
    """A published Llama or Qwen2 folder; `settings` go into tokenizer_config.json (None: taken out)."""
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(0)
    model(config(**SHAPE, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return folder


def ids(folder: Path, **how) -> list[list[int]]:
    """As an engine reads the folder: without remote code."""
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, **how)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


KINDS = {
    "llama, sentencepiece": ("llama", sentencepiece, {}),
    "llama, digits in threes": ("llama", lambda: byte_level(split(r"\p{N}{1,3}")), {}),
    "llama, digits alone": ("llama", lambda: byte_level(digits_alone()), {}),
    "llama, GPT-2's class": (
        "llama",
        lambda: byte_level(gpt2_rule()),
        {"tokenizer_class": "GPT2TokenizerFast"},
    ),
    "llama, no class": ("llama", lambda: byte_level(digits_alone()), {"tokenizer_class": None}),
    "llama, its class, legacy": ("llama", lambda: sentencepiece(True), {"add_bos_token": True}),
    "llama, its class": ("llama", lambda: sentencepiece(False), {"add_bos_token": True}),
    "llama, fast class": ("llama", sentencepiece, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    "llama, added tokens": ("llama", with_added_tokens, {}),
    "qwen2": (
        "qwen2",
        lambda: byte_level(split(r"\p{N}"), normalizers.NFC()),
        {"tokenizer_class": "Qwen2Tokenizer"},
    ),
    "qwen2, another rule": ("qwen2", lambda: byte_level(split(r"\p{N}{1,3}")), {}),
    "qwen2, no class": ("qwen2", lambda: byte_level(digits_alone()), {"tokenizer_class": None}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_prepared_folder_reads_as_its_source(name, tmp_path):
    kind, make, settings = KINDS[name]
    source = source_folder(tmp_path / "source", kind, make(), **settings)
    prepare(str(source), tmp_path / "out")
    assert ids(tmp_path / "out") == ids(source) == ids(tmp_path / "out", trust_remote_code=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind
    if settings.get("tokenizer_class", "") is not None:
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_class_that_loses_text_gives_way_to_tokenizer_json(kind, tmp_path, capsys):
    """transformers takes the class by name and rebuilds a tokenizer without spaces or without letters."""
    make = sentencepiece if kind == "qwen2" else lambda: byte_level(split(r"\p{N}{1,3}"))
    source = source_folder(tmp_path / "source", kind, make(), tokenizer_class="LlamaTokenizerFast")
    assert loses_text(load_tokenizer(source)) and not loses_text(from_file(source))
    prepare(str(source), tmp_path / "out")
    assert "loses text" in capsys.readouterr().err
    own = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert ids(tmp_path / "out") == [own.encode(text).ids for text in TEXTS]


def test_a_note_says_that_tokenizer_json_reads_other_ids(tmp_path, capsys):
    source = source_folder(tmp_path / "source", "qwen2", byte_level(split(r"\p{N}{1,3}")))
    prepare(str(source), tmp_path / "out")
    warning = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warning) == 1 and "tokenizer.json" in warning[0] and str(source) in warning[0]


def test_an_export_reads_as_its_base(tmp_path):
    source = source_folder(tmp_path / "source", "llama", sentencepiece())
    prepare(str(source), tmp_path / "base")
    export(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    assert ids(tmp_path / "out") == ids(source)


def test_a_released_folder_reads_as_before(tmp_path):
    """Its model type is not transformers' own, so its tokenizer.json was read as it is."""
    source = save_folder(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "mimo"}
    (source / "config.json").write_text(json.dumps(config))
    byte_level(split(r"\p{N}{1,3}")).save_pretrained(source)
    before = ids(source)
    prepare(str(source), tmp_path / "out")
    assert ids(tmp_path / "out") == before


def test_the_difference_is_named(tmp_path):
    one, other = byte_level(split(r"\p{N}{1,3}")), byte_level(split(r"\p{N}"))
    assert different(one, one) is None and "2023" in different(one, other)
    assert different(one, with_added_tokens()) is not None


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    source = source_folder(tmp_path / "source", "llama", sentencepiece())
    for content in (None, "{", '{"version": "1.0", "model": {"type": "none"}}', "<html>"):
        (source / "tokenizer.json").unlink(missing_ok=True)
        if content:
            (source / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match="source") as error:
            own_tokenizer(source)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError):
            prepare(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def gguf_file(path: Path, pre: str, tokenizer) -> Path:
    """A tiny Llama as llama.cpp stores one: a byte-level vocabulary and its pre-tokenizer's name."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    tensors = LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"<unused{n}>" for n in range(SHAPE["vocab_size"] - len(tokens))]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_rope_dimension_count(SHAPE["hidden_size"] // SHAPE["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(SHAPE["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    special = ("<|endoftext|>", "<|end|>")
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        **{f"model.layers.0.self_attn.{n}_proj": f"blk.0.attn_{n}" for n in "qkv"},
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        **{f"model.layers.0.mlp.{n}_proj": f"blk.0.ffn_{n}" for n in ("gate", "up", "down")},
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "pre, rule",
    [
        ("smollm", digits_alone),
        ("llama-bpe", lambda: split(r"\p{N}{1,3}")),
        ("qwen2", lambda: split(r"\p{N}")),
        ("gpt-2", gpt2_rule),
    ],
)
def test_a_gguf_file_reads_as_its_models_own_tokenizer(pre, rule, tmp_path):
    own = byte_level(rule())
    if pre == "qwen2":  # and composes accents, which the file does not say
        own.backend_tokenizer.normalizer = normalizers.NFC()
    prepare(str(gguf_file(tmp_path / "model.gguf", pre, own)), tmp_path / "out")
    assert ids(tmp_path / "out") == [own(text)["input_ids"] for text in TEXTS]


def test_a_gguf_file_is_parsed_once(tmp_path, monkeypatch):
    """transformers alone would parse it three times more; afterwards `gguf` is as it was."""
    gguf = pytest.importorskip("gguf")
    own = byte_level(gpt2_rule())
    path, parsed, whole = gguf_file(tmp_path / "model.gguf", "gpt-2", own), [], gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda *given: (parsed.append(given), whole(*given))[1])
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    prepare(str(path), tmp_path / "out")
    assert len(parsed) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_gguf_file_of_an_unknown_pre_tokenizer_is_refused(tmp_path):
    for pre in ("martian", "default"):
        path = gguf_file(tmp_path / "model.gguf", pre, byte_level(gpt2_rule()))
        with pytest.raises(InputError, match=pre):
            prepare(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_templates_for_tools_travel_with_a_folder(tmp_path):
    templates = {"default": "{{ messages[0]['content'] }}", "tool_use": "tools: {{ messages[0]['content'] }}"}
    plain = source_folder(tmp_path / "llama", "llama", byte_level(gpt2_rule()))
    tokenizer = load_tokenizer(plain)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(plain)
    assert (plain / "additional_chat_templates" / "tool_use.jinja").exists()
    prepare(str(plain), tmp_path / "made")
    export(tmp_path / "made", tmp_path / "made", tmp_path / "exported")
    prepare(str(tmp_path / "exported"), tmp_path / "again")
    for name in ("made", "exported", "again"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == templates


def test_a_tokenizer_with_ids_beyond_the_models_rows_is_refused(tmp_path):
    source = source_folder(tmp_path / "llama", "llama", byte_level(gpt2_rule()))
    prepare(str(source), tmp_path / "made")
    for folder in (source, tmp_path / "made"):
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens([f"<more {n}>" for n in range(SHAPE["vocab_size"])])
        tokenizer.save_pretrained(folder)
        with pytest.raises(InputError, match="has the id"):
            prepare(str(folder), tmp_path / "out")
    with pytest.raises(InputError, match="has the id"):
        export(tmp_path / "made", tmp_path / "made", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("template", ["{% for x %}", "{{ nothing.at.all }}", "{{ raise_exception('no') }}"])
def test_a_broken_chat_template_is_said_so(template, tmp_path, capsys):
    tokenizer = byte_level(gpt2_rule())
    tokenizer.chat_template = template
    prepare(str(source_folder(tmp_path / "llama", "llama", tokenizer)), tmp_path / "out")
    assert "fails on a plain question" in capsys.readouterr().err
