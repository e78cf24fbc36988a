"""Head + base -> one folder: byte for byte what went in, and readable by everyone it is for."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_folder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fastmtp.checkpoint import HEAD_TENSORS, PREFIX, read_head
from fastmtp.cli import InputError
from fastmtp.export import export
from fastmtp.head.modeling_mimo import MiMoForCausalLM
from fastmtp.reference.model import load


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def checkpoint(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """What training leaves: the head alone, float32, every tensor changed."""
    folder.mkdir(parents=True)
    head = {name: tensor.float() + 0.125 for name, tensor in weights(base).items() if name.startswith(PREFIX)}
    save_file(head, folder / "model.safetensors")
    return head


@pytest.fixture(scope="module", params=["one file", "shards", "bfloat16"])
def exported(request, tmp_path_factory, base_folder):
    """(base, head, exported folder)"""
    work = tmp_path_factory.mktemp("export")
    base = base_folder
    if request.param == "shards":
        base = save_folder(work / "base", shards="100KB")
        assert len(list(base.glob("*.safetensors"))) > 2
    elif request.param == "bfloat16":
        base = save_folder(work / "base", dtype=torch.bfloat16)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    head = checkpoint(work / "checkpoint-1", base)
    export(base, work / "checkpoint-1", work / "out")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before, "the base was changed"
    return base, head, work / "out"


def test_round_trip(exported):
    base, head, out = exported
    old, new = weights(base), weights(out)
    assert new.keys() == old.keys()
    for name, tensor in new.items():
        wanted = head[name].to(old[name].dtype) if name in head else old[name]
        assert tensor.dtype == old[name].dtype and torch.equal(tensor, wanted), name
    assert read_head(out).keys() == HEAD_TENSORS


def test_the_index_names_every_tensor_once(exported):
    _, _, out = exported
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        assert name in load_file(out / file)
    assert sum(len(load_file(path)) for path in out.glob("*.safetensors")) == len(index)


def test_config_is_what_engines_read(exported):
    base, _, out = exported
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["architectures"] == ["MiMoForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1 and config["tie_word_embeddings"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    kept = json.loads((base / "config.json").read_text())
    assert all(
        config[key] == kept[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "eos_token_id")
    )
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((out / "run.json").read_text())["config"]["base"] == str(base)


def test_loads_as_plain_qwen2_too(exported):
    """An engine that knows nothing of the head reads the same folder."""
    _, _, out = exported
    assert AutoConfig.from_pretrained(out).model_type == "qwen2"


def test_loads_with_remote_code_and_answers_the_same(exported):
    base, _, out = exported
    ids = torch.arange(3, 40)[None]
    ours = load(base, "float32").net
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(theirs).__module__.startswith("transformers_modules") and type(theirs) is not MiMoForCausalLM
    merged = load(out, "float32").net
    with torch.no_grad():
        wanted = ours(input_ids=ids).logits
        assert torch.equal(theirs(input_ids=ids).logits, wanted)
        assert torch.equal(merged(input_ids=ids).logits, wanted)
        states = [net.mtp_states(ids, num_steps=3)[1][2] for net in (theirs, merged, ours)]
        assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_exporting_onto_an_export_replaces_its_head(exported, tmp_path):
    base, _, out = exported
    head = checkpoint(tmp_path / "checkpoint-2", out)
    export(out, tmp_path / "checkpoint-2", tmp_path / "again")
    old, new = weights(base), weights(tmp_path / "again")
    assert new.keys() == old.keys()
    for name in new:
        assert torch.equal(new[name], head[name].to(old[name].dtype) if name in head else old[name])


def refused(match: str, base: Path, head: Path, out: Path) -> None:
    beside = set(out.parent.iterdir())
    with pytest.raises(InputError, match=match) as error:
        export(base, head, out)
    assert "\n" not in str(error.value) and set(out.parent.iterdir()) == beside


def test_what_is_no_head_is_refused_and_nothing_written(base_folder, tmp_path):
    good = checkpoint(tmp_path / "good", base_folder)
    for name, tensors in {
        "lacking": {n: t for n, t in good.items() if "final_layernorm" not in n},
        "extra": good | {f"{PREFIX}0.self_attn.q_norm.weight": torch.ones(3)},
        "second": good | {f"{PREFIX}1.final_layernorm.weight": torch.ones(3)},
        "none": {"model.norm.weight": torch.ones(3)},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        refused("not a checkpoint of an MTP head", base_folder, tmp_path / name, tmp_path / "out")
        refused("not a checkpoint of an MTP head", tmp_path / name, tmp_path / "good", tmp_path / "out")
    (tmp_path / "shape").mkdir()
    save_file(
        good | {f"{PREFIX}0.input_proj.weight": torch.ones(3, 6)}, tmp_path / "shape" / "model.safetensors"
    )
    refused("input_proj.weight is .3, 6.", base_folder, tmp_path / "shape", tmp_path / "out")
    (tmp_path / "torn").mkdir()
    whole = (tmp_path / "good" / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(whole[:40])
    refused("not a safetensors file", base_folder, tmp_path / "torn", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused("no .safetensors", base_folder, tmp_path / "empty", tmp_path / "out")
    refused("no such", base_folder, tmp_path / "absent", tmp_path / "out")
    refused("no such", tmp_path / "absent", tmp_path / "good", tmp_path / "out")


def test_the_output_is_neither_an_input_nor_around_one_nor_anothers(base_folder, tmp_path):
    good = tmp_path / "runs" / "checkpoint-1"
    checkpoint(good, base_folder)
    before = weights(base_folder)
    for out in (base_folder, good, good.parent, base_folder.parent):
        refused("must be a new folder", base_folder, good, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("only copy")
    refused("holds other files", base_folder, good, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists() and weights(base_folder).keys() == before.keys()
    export(base_folder, good, tmp_path / "out")
    export(base_folder, good, tmp_path / "out")  # its own earlier output is replaced


def test_a_shipped_head_by_its_name(tmp_path, base_folder, monkeypatch):
    head = checkpoint(tmp_path / "heads" / "tiny-vanilla", base_folder)
    monkeypatch.setattr("fastmtp.checkpoint.HEADS", tmp_path / "heads")
    export(base_folder, "tiny-vanilla", tmp_path / "out")
    assert torch.equal(
        read_head(tmp_path / "out")[f"{PREFIX}0.input_proj.weight"], head[f"{PREFIX}0.input_proj.weight"]
    )
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())["inputs"]
    assert [Path(path).parent.name for path in recorded] == ["tiny-vanilla"]
