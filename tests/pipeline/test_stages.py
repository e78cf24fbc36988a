"""Stages are reused, resumed or made afresh by their fingerprint."""

import dataclasses
import types
from pathlib import Path

import pytest

from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.pipeline.stages import Stage, facts_of, perform, read_log, remove


@pytest.fixture
def calls():
    """Stands in for what runs a stage: a call is noted, then does what the test put into `calls.action`."""
    noted = types.SimpleNamespace(arguments=[], action=lambda: None)

    def execute(stage):
        noted.arguments.append(stage.arguments)
        noted.action()

    noted.execute = execute
    return noted


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A stage that reads in.jsonl and makes out.jsonl, in a folder that the quickstart has claimed."""
    monkeypatch.chdir(tmp_path)
    files.claim(tmp_path, folder=True)
    Path("in.jsonl").write_text("{}")
    return Stage("one", "fastmtp.decoding", "--out out.jsonl", "out.jsonl", ("in.jsonl",))


RECORD = Path("stages.json")


def run_stage(calls, stage, **changed) -> None:
    settings = {"code": "this", "gpu": None} | changed
    perform(stage, facts_of(stage, settings), read_log(RECORD), RECORD, calls.execute)


def test_a_finished_stage_is_reused_until_something_it_depends_on_changes(calls, stage, capsys):
    made = Path(stage.makes)
    calls.action = lambda: made.write_text(made.read_text() + "again" if made.exists() else "{}")
    run_stage(calls, stage)
    run_stage(calls, stage)
    assert len(calls.arguments) == 1 and "reused out.jsonl" in capsys.readouterr().out
    run_stage(calls, stage, code="other")
    assert len(calls.arguments) == 2 and "made again: code:" in capsys.readouterr().out
    run_stage(calls, stage, gpu="NVIDIA H100")
    assert len(calls.arguments) == 3 and "made again:" in capsys.readouterr().out
    run_stage(calls, stage)
    Path("in.jsonl").write_text("[]")  # the same name, the same size
    run_stage(calls, stage)
    assert len(calls.arguments) == 5 and "in.jsonl: other content" in capsys.readouterr().out
    run_stage(calls, dataclasses.replace(stage, words="--out out.jsonl --limit 4"))
    assert len(calls.arguments) == 6
    assert made.read_text() == "{}"  # each time afresh


def test_an_output_that_something_else_changed_is_made_anew(calls, stage, capsys):
    calls.action = lambda: Path(stage.makes).write_text("{}")
    run_stage(calls, stage)
    Path(stage.makes).write_text("[]")
    run_stage(calls, stage)
    assert len(calls.arguments) == 2 and Path(stage.makes).read_text() == "{}"
    assert "out.jsonl: other content" in capsys.readouterr().out
    Path(stage.makes).unlink()
    run_stage(calls, stage)
    assert len(calls.arguments) == 3


def test_an_interrupted_stage_keeps_what_it_made_and_is_not_called_done(calls, stage):
    def stop():
        partial.write_text("half")
        raise KeyboardInterrupt

    partial = Path(".out.jsonl.partial")
    calls.action = stop
    with pytest.raises(KeyboardInterrupt):
        run_stage(calls, stage)
    assert read_log(RECORD)["one"]["seconds"] is None
    calls.action = lambda: Path(stage.makes).write_text("{}")
    run_stage(calls, stage)
    assert partial.exists() and len(calls.arguments) == 2
    run_stage(calls, stage, code="other")
    assert not partial.exists()


def test_a_killed_stage_was_on_record_before_it_began(calls, stage):
    calls.action = lambda: logs.append(read_log(RECORD))
    logs = []
    with pytest.raises(InputError):  # it made nothing
        run_stage(calls, stage)
    assert logs[0]["one"]["seconds"] is None and logs[0]["one"]["facts"] == facts_of(
        stage, {"code": "this", "gpu": None}
    )


@pytest.mark.parametrize("made", ["out.jsonl", "folder"])
def test_what_is_not_ours_is_not_removed(calls, stage, made, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("theirs"))  # a folder that nobody claimed
    Path("in.jsonl").write_text("{}")
    if made == "folder":
        Path(made).mkdir()
    mine = Path(made) / "notes.txt" if made == "folder" else Path(made)
    mine.write_text("precious")
    with pytest.raises(InputError, match=made):
        run_stage(calls, dataclasses.replace(stage, makes=made))
    assert mine.read_text() == "precious" and calls.arguments == []


def test_hidden_files_of_ones_own_beside_an_output_stay(stage):
    names = [".out.jsonl.notes", ".out.jsonl.bak", ".out.jsonl.123.old", ".out.jsonl.0123456789ab.partial"]
    for name in names:
        Path(name).write_text("x")
    remove(Path("out.jsonl"))
    assert [Path(name).exists() for name in names] == [True, True, False, False]


@pytest.mark.parametrize("text", ['{"one": 5}', '{"one": {"key": "k1", "seconds": 3, "spent": 3.0}}'])
def test_a_log_of_another_form_counts_as_nothing_done(calls, stage, text):
    RECORD.write_text(text)
    calls.action = lambda: Path(stage.makes).write_text("{}")
    run_stage(calls, stage)
    assert len(calls.arguments) == 1


def test_how_fast_a_stage_goes_is_no_reason_to_run_it_again(calls, stage):
    calls.action = lambda: Path(stage.makes).write_text("{}")
    run_stage(calls, stage)
    run_stage(calls, dataclasses.replace(stage, how="--engines 4", environment={"NPROC_PER_NODE": "4"}))
    assert calls.arguments == [["--out", "out.jsonl"]]


@pytest.mark.parametrize("keeps, stays", [("nothing", []), ("all", [1, 2]), ("all of another command", [1])])
def test_what_a_command_may_keep_of_its_output_stays(calls, stage, keeps, stays):
    stage, seen = dataclasses.replace(stage, keeps=keeps), []

    def action():
        seen.append(Path(stage.makes).exists())
        Path(stage.makes).write_text("{}")

    calls.action = action
    run_stage(calls, stage)
    run_stage(calls, dataclasses.replace(stage, words="--out out.jsonl --limit 4"))  # another command
    Path("in.jsonl").write_text("[]")  # another input
    run_stage(calls, dataclasses.replace(stage, words="--out out.jsonl --limit 4"))
    assert [n for n, kept in enumerate(seen) if kept] == stays
