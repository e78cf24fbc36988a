"""export --for vllm-stock: two folders that share their weights."""

import json

import pytest
from safetensors import safe_open

from fastmtp import export
from fastmtp.checkpoint import CONTRACT_KEY, PREFIX, read_head, save_head
from fastmtp.cli import InputError
from fastmtp.formats.weights import INDEX


@pytest.fixture
def out(base_folder, tmp_path):
    out = tmp_path / "out"
    export.main(
        ["--base", str(base_folder), "--head", str(base_folder), "--out", str(out), "--for", "vllm-stock"]
    )
    return out


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_the_backbone_is_a_qwen2_that_keeps_the_number_of_heads(out):
    backbone, model = config(out / "backbone"), config(out / "model")
    assert backbone["architectures"] == ["Qwen2ForCausalLM"] and backbone["num_nextn_predict_layers"] == 1
    assert "auto_map" not in backbone and CONTRACT_KEY not in backbone
    assert model["architectures"] == ["MiMoForCausalLM"] and CONTRACT_KEY in model


def test_its_weights_are_the_models_without_the_head_and_move_with_it(out, tmp_path):
    moved = out.rename(tmp_path / "moved")
    index = json.loads((moved / "backbone" / INDEX).read_text())
    names = set()
    for path in (moved / "backbone").glob("*.safetensors"):
        assert path.is_symlink() and path.resolve().parent == (moved / "model").resolve()
        with safe_open(path, framework="pt") as tensors:
            names |= set(tensors.keys())
    assert names == set(index["weight_map"]) and not any(name.startswith(PREFIX) for name in names)
    both = json.loads((moved / "model" / INDEX).read_text())["weight_map"]
    assert {name for name in both if not name.startswith(PREFIX)} == names
    assert index["metadata"]["total_size"] == sum(
        path.stat().st_size for path in (moved / "backbone").glob("*.safetensors")
    )


def test_the_readme_says_how_to_start_it_and_a_second_run_replaces_our_own(out, base_folder):
    assert '"model": "./model"' in (out / "README.md").read_text()
    assert json.loads((out / "run.json").read_text())
    export.main(["--base", str(base_folder), "--head", str(base_folder), "--out", str(out)])
    assert not (out / "backbone").exists() and (out / "config.json").exists()


def test_transformers_reads_the_backbone_as_it_is(out, base_folder):
    import torch
    from transformers import AutoModelForCausalLM

    from fastmtp.reference.model import load

    ids = torch.tensor([[1, 2, 3, 4]])
    backbone = AutoModelForCausalLM.from_pretrained(out / "backbone", dtype="float32")
    assert torch.equal(backbone(input_ids=ids).logits, load(base_folder).net(input_ids=ids).logits)


def test_a_head_for_the_state_before_the_norm_needs_no_second_folder(base_folder, tmp_path):
    head = tmp_path / "head"
    head.mkdir()
    save_head(head, read_head(base_folder), "pre_norm")
    with pytest.raises(InputError, match="omit --for"):
        export.export(base_folder, head, tmp_path / "out", vllm_stock=True)
