"""The losslessness check on a tiny random model: right drafts pass, unverified drafts are caught, rounding is
told apart.
"""

import json

import pytest
import torch

from evaluation import lossless
from fastmtp.cli import InputError
from fastmtp.reference import model as model_module
from fastmtp.reference import speculative


@pytest.fixture
def model(base_folder):
    return str(base_folder)


def check(model, questions, out, *more):
    given = [
        "--model",
        model,
        "--arms",
        "baseline,fastmtp:2",
        "--tasks",
        "mt_bench",
        "--backend",
        "reference",
    ]
    lossless.main(
        [*given, "--question-folder", str(questions), "--max-gen-length", "24", "--out", str(out), *more]
    )
    return json.loads((out / "lossless.json").read_text())


def accept_everything(tokens, parents, choose):
    """The planted error: every draft of the chain is believed."""
    path = list(range(1, len(tokens)))
    return path, choose(path[-1] if path else 0)


def test_verified_drafts_give_the_models_own_text(model, questions, tmp_path, capsys):
    report = check(model, questions, tmp_path / "out")
    arm = report["arms"]["fastmtp:2"]
    assert (arm["questions"], arm["identical"], arm["verdict"]) == (5, 5, "lossless")
    assert "5 of 5 outputs identical in float32: lossless" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_accepted_without_verification_are_caught(dtype, model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(speculative, "walk", accept_everything)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="changed the model's text"):
        check(model, questions, out, "--dtype", dtype)
    arm = json.loads((out / "lossless.json").read_text())["arms"]["fastmtp:2"]
    assert arm["verdict"] == "NOT LOSSLESS" and arm["identical"] < 5
    worst = max(arm["differences"], key=lambda d: d["drafted_gap"])
    assert worst["plain_gap"] < 0.5 < worst["drafted_gap"], (
        "the drafting arm chose the wrong token, not the baseline"
    )


def test_answers_of_an_earlier_run_are_judged_without_asking_again(model, questions, tmp_path, monkeypatch):
    out = tmp_path / "out"
    check(model, questions, out)

    def refuse(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr(speculative, "generate", refuse)
    monkeypatch.setattr(model_module, "load", refuse)
    assert check(model, questions, out)["arms"]["fastmtp:2"]["verdict"] == "lossless"


class Fixed:
    """A backbone with given next logits."""

    def __init__(self, logits):
        self.logits = torch.tensor(logits)

    def next_logits(self, ids):
        self.ids = ids
        return self.logits


def test_a_close_call_is_rounding_and_a_far_one_is_not():
    backbone = Fixed([0.0, 4.0, 3.9, 1.0])
    close = lossless.judge(backbone, [7, 8], [0, 1, 1], [0, 2, 1], tolerance=0.5)
    assert backbone.ids == [7, 8, 0]
    assert close["position"] == 1 and close["rounding"]
    assert close["margin"] == pytest.approx(0.1) and close["drafted_gap"] == pytest.approx(0.1)
    far = lossless.judge(backbone, [7, 8], [0, 1], [0, 3], tolerance=0.5)
    assert not far["rounding"] and far["drafted_gap"] == pytest.approx(3.0)
    assert not lossless.judge(backbone, [7], [0, 3], [0, 1], tolerance=0.5)["rounding"], (
        "a wrong baseline counts too"
    )
    ended = lossless.judge(backbone, [7], [0, 1], [0], tolerance=0.5)
    assert ended["drafted_token"] is None and not ended["rounding"]
    assert lossless.judge(backbone, [7], [0, 1], [0, 1], tolerance=0.5) is None


def test_float32_excuses_nothing():
    rounding = [{"rounding": True}]
    assert lossless.verdict_of(rounding, "bfloat16", 1) == "rounding"
    assert lossless.verdict_of(rounding, "float32", 1) == "NOT LOSSLESS"
    assert lossless.verdict_of([], "float32", 1) == "lossless"
    assert lossless.verdict_of([], "float32", 0) == "NOTHING TO COMPARE"


def test_wrong_use(model, questions, tmp_path):
    with pytest.raises(InputError, match="name the baseline"):
        check(model, questions, tmp_path / "out", "--arms", "fastmtp:2")
    with pytest.raises(InputError, match="checked at 0"):
        check(model, questions, tmp_path / "out", "--temperature", "0.6")
