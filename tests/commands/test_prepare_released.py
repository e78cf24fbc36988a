"""A folder in MiMo layout as the source: adopted as it is, or refused if its tensors are not whole."""

import json

import pytest
import torch
from helpers.tiny import save_folder, save_released
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastmtp.checkpoint import HEAD_TENSORS, read_head
from fastmtp.cli import InputError
from fastmtp.head.modeling_mimo import MiMoConfig, MiMoForCausalLM
from fastmtp.prepare_model import prepare
from fastmtp.reference.model import load

RELEASED = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{n}.{name}"
        for n in range(2)
        for name in (
            "input_layernorm.weight",
            "self_attn.q_proj.weight",
            "self_attn.q_proj.bias",
            "self_attn.k_proj.weight",
            "self_attn.k_proj.bias",
            "self_attn.v_proj.weight",
            "self_attn.v_proj.bias",
            "self_attn.o_proj.weight",
            "post_attention_layernorm.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
        )
    ),
    "model.norm.weight",
    "lm_head.weight",
    "model.mtp_layers.0.token_layernorm.weight",
    "model.mtp_layers.0.hidden_layernorm.weight",
    "model.mtp_layers.0.input_proj.weight",
    "model.mtp_layers.0.input_layernorm.weight",
    "model.mtp_layers.0.self_attn.q_proj.weight",
    "model.mtp_layers.0.self_attn.q_proj.bias",
    "model.mtp_layers.0.self_attn.k_proj.weight",
    "model.mtp_layers.0.self_attn.k_proj.bias",
    "model.mtp_layers.0.self_attn.v_proj.weight",
    "model.mtp_layers.0.self_attn.v_proj.bias",
    "model.mtp_layers.0.self_attn.o_proj.weight",
    "model.mtp_layers.0.post_attention_layernorm.weight",
    "model.mtp_layers.0.mlp.gate_proj.weight",
    "model.mtp_layers.0.mlp.up_proj.weight",
    "model.mtp_layers.0.mlp.down_proj.weight",
    "model.mtp_layers.0.final_layernorm.weight",
]


def test_the_released_key_set_loads_strictly(tmp_path):
    source = save_released(tmp_path / "mimo")
    assert set(load_file(source / "model.safetensors")) == set(RELEASED) and len(RELEASED) == 43
    net = MiMoForCausalLM(MiMoConfig.from_pretrained(source))
    net.load_state_dict(load_file(source / "model.safetensors"), strict=True)
    assert {name for name, _ in net.named_parameters()} == set(RELEASED)


def test_a_released_folder_is_adopted_as_it_is(tmp_path):
    source = save_released(tmp_path / "mimo")
    prepare(str(source), tmp_path / "out")
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"  # with qwen2, transformers would read other ids from it
    assert config["num_nextn_predict_layers"] == 1
    assert not (tmp_path / "out" / "configuration_mimo.py").exists()
    model, ids = load(tmp_path / "out"), torch.arange(7, 90)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
        assert torch.equal(plain, model.net(input_ids=ids).logits)
    assert model.net.config.rope_parameters["rope_theta"] == 640000
    assert read_head(tmp_path / "out").keys() == HEAD_TENSORS


def test_a_released_folder_without_its_head_is_refused(tmp_path):
    source = save_released(tmp_path / "mimo")
    tensors = load_file(source / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "mtp" not in n}, source / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"model\.mtp_layers\.0"):
        prepare(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_model_with_an_equal_matrix_is_taken(tmp_path):
    source = save_folder(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    prepare(str(source), tmp_path / "out")
    net = load(tmp_path / "out").net
    assert torch.equal(net.lm_head.weight, net.model.embed_tokens.weight)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="ties lm_head.weight"):
        load(tmp_path / "out")
