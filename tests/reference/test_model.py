"""Folders that cannot work are refused in one line, before their weights are read; nothing is made up."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_folder
from safetensors.torch import load_file, save_file

from fastmtp.cli import InputError
from fastmtp.formats.weights import INDEX
from fastmtp.reference.model import check, head_for, load

LAYER = "model.layers.1.mlp.up_proj.weight"
HEAD = "model.mtp_layers.0.input_proj.weight"


@pytest.fixture
def folder(base_folder, tmp_path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "m"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The same model in several files. Do not write into it."""
    return save_folder(tmp_path_factory.mktemp("shards") / "model", shards="100KB")


def change(folder: Path, edit) -> None:
    """Write the weights again as `edit` returns them."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_value(tensors: dict, name: str, value: float) -> dict:
    return tensors | {name: tensors[name].clone().index_fill_(0, torch.tensor([1]), value)}


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda t: {n: x for n, x in t.items() if n != LAYER}, [f"1 ({LAYER}) missing"]),
        (lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"}, ["lm_head.weight"]),
        (lambda t: {n: x for n, x in t.items() if "mtp_layers" not in n}, ["mtp_layers.0", "prepare_model"]),
        (lambda t: {f"base_model.model.{n}": x for n, x in t.items()}, ["43 (base_model.model.", "unknown"]),
        (lambda t: t | {"visual.patch.weight": torch.zeros(2)}, ["1 (visual.patch.weight) unknown"]),
        (lambda t: t | {LAYER: t[LAYER].T.contiguous()}, [LAYER, "(64, 80)", "(80, 64)"]),
        (lambda t: t | {LAYER: t[LAYER].to(torch.float8_e4m3fn)}, [LAYER, "quantised"]),
        (lambda t: t | {LAYER: t[LAYER].to(torch.int32)}, [LAYER, "unquantised"]),
    ],
    ids=["gone", "no lm_head", "no head", "prefix", "extra", "shape", "fp8", "integers"],
)
def test_tensors_that_do_not_fit_are_named(folder, edit, words):
    change(folder, edit)
    with pytest.raises(InputError) as error:
        check(folder)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", HEAD])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none_are_refused(folder, name, value):
    change(folder, lambda tensors: with_value(tensors, name, value))
    with pytest.raises(InputError, match=f"{name} has values that are not finite"):
        load(folder)


def write(text: bytes):
    return lambda path: path.write_bytes(text)


@pytest.mark.parametrize(
    "damage, words",
    [
        (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n"), "git lfs pull"),
        (write(b""), "not a safetensors file"),
        (write(b"<!doctype html>" * 9), "an HTML page"),
        (write((9).to_bytes(8, "little") + b"not json."), "torn or of another kind"),
        (write((2).to_bytes(8, "little") + b"{}"), "43 .* missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "its header describes"),
        (lambda path: os.truncate(path, 400), "torn"),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), "no .safetensors file"),
        (lambda path: path.rename(path.with_name("a.safetensors")), "cannot be loaded"),
    ],
)
def test_torn_files_are_refused(folder, damage, words):
    damage(folder / "model.safetensors")
    with pytest.raises(InputError, match=words):
        load(folder)


def index_of_the_first(folder: Path) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file == first}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage, words",
    [
        (index_of_the_first, "40 .* missing"),
        (lambda f: sorted(f.glob("model-*"))[1].unlink(), "00002-of-.* not there"),
        (lambda f: os.truncate(sorted(f.glob("model-*"))[1], 20), "00002-of-.* not a safetensors file"),
        (lambda f: (f / INDEX).unlink(), "cannot be loaded"),
        (lambda f: (f / INDEX).write_text('{"weight_map": null}'), "no weight_map"),
        (lambda f: (f / INDEX).write_text("[]"), "expected a JSON object"),
        (
            lambda f: save_file({"model.norm.weight": torch.ones(64)}, f / "model.safetensors"),
            "model.safetensors",
        ),
    ],
)
def test_an_index_is_complete_or_refused(shards, tmp_path, damage, words):
    folder = Path(shutil.copytree(shards, tmp_path / "m"))
    check(folder)
    damage(folder)
    with pytest.raises(InputError, match=words):
        load(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised weights \(awq\)"),
        ({"num_hidden_layers": 1}, "12 .model.layers.1.* unknown"),
        ({"vocab_size": 99}, r"\(320, 64\), config.json calls for \(99, 64\)"),
        ({"hidden_size": "64"}, "no usable hidden_size"),
        ({"max_position_embeddings": None}, "config.json: not usable"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
    ],
    ids=str,
)
def test_configurations_of_other_weights_are_refused(folder, changes, words):
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | changes))
    with pytest.raises(InputError, match=words):
        check(folder)


def test_a_tied_model_needs_no_lm_head(tmp_path):
    folder = save_folder(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    net = load(folder).net
    assert torch.equal(net.lm_head.weight, net.model.embed_tokens.weight)


def test_a_tokenizer_of_another_model_is_refused(folder):
    change(folder, lambda t: t | {n: t[n][:300] for n in ("lm_head.weight", "model.embed_tokens.weight")})
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"vocab_size": 300}))
    with pytest.raises(InputError, match="the tokenizer has the id 319, the model only 300"):
        load(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="no vocabulary|no tokenizer"):
        load(folder)


def test_a_head_must_fit_the_model(base_folder, tmp_path):
    config = check(base_folder)
    narrow = save_folder(tmp_path / "narrow", hidden_size=32)
    with pytest.raises(InputError, match=r"is \(32,\), the base calls for \(64,\)"):
        head_for(narrow, config)
    tensors = {n: t for n, t in load_file(base_folder / "model.safetensors").items() if "mtp_layers" in n}
    cases = {
        "not finite": with_value(tensors, HEAD, float("nan")),
        "is I8, not float32": {name: tensor.to(torch.int8) for name, tensor in tensors.items()},
    }
    for n, (words, head) in enumerate(cases.items()):
        (tmp_path / f"h{n}").mkdir()
        save_file(head, tmp_path / f"h{n}" / "model.safetensors")
        with pytest.raises(InputError, match=words):
            head_for(tmp_path / f"h{n}", config)
    (tmp_path / "h0" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        head_for(tmp_path / "h0", config)
