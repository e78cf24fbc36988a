"""Stages are reused, resumed or made afresh by their key; what the stages say fits together."""

import dataclasses
import importlib
import shutil
import types
from pathlib import Path

import pytest

from fastmtp import files, fingerprint, quickstart
from fastmtp.cli import InputError
from fastmtp.fingerprint import differences
from fastmtp.inputs import resource
from fastmtp.quickstart import SMOKE, VANILLA, Sizes, Stage, facts_of, perform, read_log, remove, stages


@pytest.fixture
def calls(monkeypatch):
    """Replaces the stages' modules: a call is noted, then does what the test put into `calls.action`."""
    noted = types.SimpleNamespace(arguments=[], action=lambda: None)

    def main(arguments):
        noted.arguments.append(arguments)
        noted.action()

    stand_in = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(main=main))
    monkeypatch.setattr(quickstart, "importlib", stand_in)
    return noted


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A stage that reads in.jsonl and makes out.jsonl, in a folder that the quickstart has claimed."""
    monkeypatch.chdir(tmp_path)
    files.claim(tmp_path, folder=True)
    Path("in.jsonl").write_text("{}")
    return Stage("one", "decoding", "--out out.jsonl", "out.jsonl", ("in.jsonl",))


RECORD = Path("stages.json")


def run_stage(stage, **changed) -> None:
    perform(stage, facts_of(stage) | changed, read_log(RECORD), RECORD)


def test_a_finished_stage_is_reused_until_something_it_depends_on_changes(calls, stage, capsys):
    made = Path(stage.makes)
    calls.action = lambda: made.write_text(made.read_text() + "again" if made.exists() else "{}")
    run_stage(stage)
    run_stage(stage)
    assert len(calls.arguments) == 1 and "reused out.jsonl" in capsys.readouterr().out
    run_stage(stage, code="other")
    assert len(calls.arguments) == 2 and "made again: code:" in capsys.readouterr().out
    run_stage(stage, gpu="NVIDIA H100")
    assert len(calls.arguments) == 3 and "made again:" in capsys.readouterr().out
    run_stage(stage)
    Path("in.jsonl").write_text("[]")  # the same name, the same size
    run_stage(stage)
    assert len(calls.arguments) == 5 and "in.jsonl: other content" in capsys.readouterr().out
    run_stage(dataclasses.replace(stage, words="--out out.jsonl --limit 4"))
    assert len(calls.arguments) == 6
    assert made.read_text() == "{}"  # each time afresh


def test_an_output_that_something_else_changed_is_made_anew(calls, stage, capsys):
    calls.action = lambda: Path(stage.makes).write_text("{}")
    run_stage(stage)
    Path(stage.makes).write_text("[]")
    run_stage(stage)
    assert len(calls.arguments) == 2 and Path(stage.makes).read_text() == "{}"
    assert "out.jsonl: other content" in capsys.readouterr().out
    Path(stage.makes).unlink()
    run_stage(stage)
    assert len(calls.arguments) == 3


def test_an_interrupted_stage_keeps_what_it_made_and_is_not_called_done(calls, stage):
    def stop():
        partial.write_text("half")
        raise KeyboardInterrupt

    partial = Path(".out.jsonl.partial")
    calls.action = stop
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage)
    assert read_log(RECORD)["one"]["seconds"] is None
    calls.action = lambda: Path(stage.makes).write_text("{}")
    run_stage(stage)
    assert partial.exists() and len(calls.arguments) == 2
    run_stage(stage, code="other")
    assert not partial.exists()


def test_a_killed_stage_was_on_record_before_it_began(calls, stage):
    calls.action = lambda: logs.append(read_log(RECORD))
    logs = []
    with pytest.raises(InputError):  # it made nothing
        run_stage(stage)
    assert logs[0]["one"]["seconds"] is None and logs[0]["one"]["facts"] == facts_of(stage)


@pytest.mark.parametrize("made", ["out.jsonl", "folder"])
def test_what_is_not_ours_is_not_removed(calls, stage, made, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("theirs"))  # a folder that nobody claimed
    Path("in.jsonl").write_text("{}")
    if made == "folder":
        Path(made).mkdir()
    mine = Path(made) / "notes.txt" if made == "folder" else Path(made)
    mine.write_text("precious")
    with pytest.raises(InputError, match=made):
        run_stage(dataclasses.replace(stage, makes=made))
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
    run_stage(stage)
    assert len(calls.arguments) == 1


def test_a_head_or_the_code_that_changes_is_seen(monkeypatch, tmp_path):
    prepare = stages(SMOKE)[0]
    before = facts_of(prepare)
    shutil.copytree(quickstart.HEADS / VANILLA, tmp_path / VANILLA)
    monkeypatch.setattr(quickstart, "HEADS", tmp_path)
    assert facts_of(prepare) == before  # a copy is the same head
    with open(tmp_path / VANILLA / "model.safetensors", "r+b") as weights:
        weights.seek(-2, 2)
        weights.write(b"xx")
    assert differences(before, facts_of(prepare)) == [f"{VANILLA}: other content"]
    package = tmp_path / "package"
    (package / "head").mkdir(parents=True)
    (package / "head" / "x.py").write_text("a = 1")
    monkeypatch.setattr(fingerprint, "__file__", str(package / "fingerprint.py"))
    first = fingerprint.code.__wrapped__()
    (package / "head" / "x.py").write_text("a = 2")
    assert fingerprint.code.__wrapped__() != first


@pytest.mark.parametrize("sizes", [Sizes(), SMOKE])
def test_every_stage_is_a_command_whose_arguments_parse(sizes):
    for stage in stages(sizes):
        parser = importlib.import_module(f"fastmtp.{stage.module}").parser()
        unknown = parser.parse_known_args(stage.arguments)[1]
        assert stage.module == "train" or not unknown, stage.name


@pytest.mark.parametrize("sizes", [Sizes(), SMOKE])
def test_a_stage_says_all_that_it_reads(sizes):
    """Every path and head in its words is read, made or its own output folder; earlier stages made it."""
    made = []
    for stage in stages(sizes):
        paths = {word for word in stage.arguments if "/" in word or word in (VANILLA, quickstart.SHIPPED)}
        own = {path for path in paths if path == stage.makes or Path(stage.makes).parent == Path(path)}
        assert paths - own <= {*stage.reads}, stage.name
        for path in stage.reads:
            shipped = resource(path).exists() or path in (VANILLA, quickstart.SHIPPED)
            assert shipped or any(Path(path).is_relative_to(folder) for folder in made), path
        made.append(stage.makes)


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
