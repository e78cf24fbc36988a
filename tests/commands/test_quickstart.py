"""Stages are reused, resumed or made afresh by their key; what the stages say fits together."""

import json
import types
from pathlib import Path

import pytest

from fastmtp import quickstart
from fastmtp.quickstart import SMOKE, Sizes, Stage, perform, stages


@pytest.fixture
def calls(monkeypatch):
    """Replaces the stages' modules: a call is noted, then does what the test put into `calls.action`."""
    noted = types.SimpleNamespace(arguments=[], action=lambda: None)

    def main(arguments):
        noted.arguments.append(arguments)
        noted.action()

    monkeypatch.setattr(quickstart.importlib, "import_module", lambda name: types.SimpleNamespace(main=main))
    return noted


@pytest.fixture
def stage(tmp_path):
    return Stage("one", "decoding", ["--out", "x"], str(tmp_path / "out.txt"))


def test_a_finished_stage_is_reused_and_another_key_starts_afresh(calls, stage, tmp_path):
    made = Path(stage.makes)
    calls.action = lambda: made.write_text("done")
    log, record = {}, tmp_path / "stages.json"
    perform(stage, "k1", log, record)
    perform(stage, "k1", json.loads(record.read_text()), record)
    assert len(calls.arguments) == 1
    calls.action = lambda: made.write_text("again" if not made.exists() else "the old one was still there")
    perform(stage, "k2", log, record)
    assert made.read_text() == "again"


def test_an_interrupted_stage_keeps_what_it_made_and_is_not_called_done(calls, stage, tmp_path):
    def stop():
        partial.write_text("half")
        raise KeyboardInterrupt

    partial = tmp_path / ".out.txt.abc.partial"
    calls.action = stop
    log, record = {}, tmp_path / "stages.json"
    with pytest.raises(KeyboardInterrupt):
        perform(stage, "k1", log, record)
    assert json.loads(record.read_text())["one"]["seconds"] is None
    calls.action = lambda: Path(stage.makes).write_text("done")
    perform(stage, "k1", json.loads(record.read_text()), record)
    assert partial.exists() and len(calls.arguments) == 2
    perform(stage, "k2", log, record)
    assert not partial.exists()


def test_a_stage_whose_output_was_deleted_runs_again(calls, stage, tmp_path):
    calls.action = lambda: Path(stage.makes).write_text("done")
    log, record = {}, tmp_path / "stages.json"
    perform(stage, "k1", log, record)
    Path(stage.makes).unlink()
    perform(stage, "k1", log, record)
    assert len(calls.arguments) == 2


def test_interrupted_training_resumes_from_its_checkpoint(calls, tmp_path):
    stage = Stage("train", "train", ["recipe.yaml"], str(tmp_path / "run"))
    (tmp_path / "run" / "last-checkpoint").mkdir(parents=True)
    log = {"train": {"key": "k1", "spent": 1.0, "seconds": None}}
    perform(stage, "k1", log, tmp_path / "stages.json")
    assert calls.arguments[0][-2:] == ["--resume_from_checkpoint", f"{stage.makes}/last-checkpoint"]
    assert log["train"]["seconds"] >= 1.0


@pytest.mark.parametrize("sizes", [Sizes(), SMOKE])
def test_every_stage_is_a_command_whose_arguments_parse(sizes):
    import importlib

    for stage in stages(sizes):
        parser = importlib.import_module(f"fastmtp.{stage.module}").parser()
        unknown = parser.parse_known_args(stage.arguments)[1]
        assert stage.module == "train" or not unknown, stage.name
        assert all(Path(path).exists() for path in stage.reads)


def test_smoke_and_full_run_share_nothing_but_the_base_model():
    made = [{s.makes for s in stages(sizes)} for sizes in (Sizes(), SMOKE)]
    assert made[0] & made[1] == {"models/smollm2"}


def test_trained_and_shipped_head_decode_the_same_prompts():
    """In both precisions with the same words but for the head and the file, and all four reach the report."""
    made = {s.name: s for s in stages(Sizes())}
    for dtype in ("float32", "bfloat16"):
        own, shipped = made[f"decode {dtype}"], made[f"decode shipped-{dtype}"]
        rest = [
            word for word in shipped.arguments if word not in ("--head", quickstart.SHIPPED, shipped.makes)
        ]
        assert (
            rest == [word for word in own.arguments if word != own.makes]
            and quickstart.SHIPPED in shipped.arguments
        )
        assert {own.makes, shipped.makes} <= set(made["report"].arguments)
