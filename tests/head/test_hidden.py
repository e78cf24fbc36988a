"""`mtp_hidden`: the state before the final norm reaches the head wherever it drafts, if the head says so."""

import json

import pytest
import torch
from helpers.tiny import save_folder, tiny_model, useful_model

from fastmtp.checkpoint import head_state, read_head, save_head
from fastmtp.cli import InputError
from fastmtp.engines import sglang
from fastmtp.engines.request import Serving
from fastmtp.export import export
from fastmtp.head.modeling_mimo import SETTINGS, MiMoConfig
from fastmtp.reference.model import check, put_head
from fastmtp.reference.speculative import generate
from fastmtp.reference.teacher_forced import measure, pooled

IDS = torch.tensor([[5, 17, 3, 88, 41, 9]])


@torch.no_grad()
def test_pre_norm_is_what_enters_the_final_norm():
    net = tiny_model(3, mtp_hidden="pre_norm")
    hidden, fed = net.backbone(input_ids=IDS)
    torch.testing.assert_close(net.model.norm(fed), hidden)
    assert not torch.allclose(fed, hidden)
    seen = []
    net.head.hidden_layernorm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    states_hidden, states, _ = net.mtp_states(IDS, num_steps=2)
    torch.testing.assert_close(seen[0], fed)  # step 1 takes the backbone's state, step 2 the head's own
    torch.testing.assert_close(seen[1], states[0])
    torch.testing.assert_close(states_hidden, hidden)  # what labels are made of stays the normed state
    net.config.mtp_hidden = "post_norm"
    assert torch.equal(*net.backbone(input_ids=IDS))
    assert not torch.allclose(net.mtp_states(IDS, num_steps=1)[1][0], states[0])


@pytest.mark.parametrize("hidden", ["pre_norm", "post_norm"])
def test_training_measuring_and_decoding_feed_the_same_state(hidden):
    useful = useful_model(mtp_hidden=hidden)
    pairs = list(zip(useful.prompts, useful.answers, strict=True))
    part = pooled(measure(useful.model, [{"prompt_ids": p, "output_ids": a} for p, a in pairs], 3))
    histogram = torch.zeros(4, dtype=torch.int64)
    for prompt, answer in pairs:
        decoded = generate(useful.model, prompt, len(answer), 3)
        assert decoded.ids == answer
        histogram += torch.tensor(decoded.histogram)
    assert part.histogram == histogram.tolist() and part.accept_length > 1.4


def test_a_head_fed_with_the_other_state_is_worth_less():
    useful = useful_model(mtp_hidden="pre_norm")
    samples = [
        {"prompt_ids": p, "output_ids": a} for p, a in zip(useful.prompts, useful.answers, strict=True)
    ]
    own = pooled(measure(useful.model, samples, 3)).accept_length
    useful.model.net.config.mtp_hidden = "post_norm"
    assert pooled(measure(useful.model, samples, 3)).accept_length < own


def test_the_choice_travels_with_the_head(base_folder, tmp_path):
    head = read_head(save_folder(tmp_path / "other", seed=5))
    (tmp_path / "head").mkdir()
    save_head(tmp_path / "head", head, "pre_norm")
    assert head_state(tmp_path / "head") == "pre_norm" and head_state(base_folder) == "post_norm"
    export(base_folder, tmp_path / "head", tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    assert about["fastmtp"]["mtp_hidden"] == about["mtp_hidden"] == "pre_norm"
    assert check(tmp_path / "model").mtp_hidden == "pre_norm" == head_state(tmp_path / "model")
    with pytest.raises(InputError, match="SGLang hands over the one after"):
        sglang.check(Serving(str(tmp_path / "model")))
    sglang.check(Serving(str(tmp_path / "model"), 0))  # plain decoding needs no head
    net = tiny_model(0, vocab_size=320)
    put_head(net, tmp_path / "head", head)
    assert net.config.mtp_hidden == "pre_norm"
    put_head(net, base_folder, read_head(base_folder))
    assert net.config.mtp_hidden == "post_norm"
    export(tmp_path / "model", base_folder, tmp_path / "back")
    assert check(tmp_path / "back").mtp_hidden == "post_norm"


def test_it_is_a_recipe_key_of_two_values(base_folder, tmp_path):
    assert SETTINGS["mtp_hidden"] is str and MiMoConfig().mtp_hidden == "post_norm"
    with pytest.raises(ValueError, match="mtp_hidden must be one of post_norm, pre_norm, not normed"):
        _ = MiMoConfig(mtp_hidden="normed").objective
    (tmp_path / "odd").mkdir()
    save_head(tmp_path / "odd", read_head(base_folder), "normed")
    with pytest.raises(InputError, match="mtp_hidden is 'normed', must be post_norm or pre_norm"):
        export(base_folder, tmp_path / "odd", tmp_path / "model")
    assert not (tmp_path / "model").exists()
