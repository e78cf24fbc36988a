"""May a run go on, and where: by content, named if not; what others put into output_dir stays."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.data.training_run import RECORD, begin, depends_on, processes


@pytest.fixture
def recipe(tmp_path):
    """A resolved recipe over small files; its run has made checkpoint-2 of 4 steps."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("1\n")
    recipe = {
        "model": str(tmp_path / "model"),
        "dataset": [str(tmp_path / "rows.jsonl")],
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 0.001,
        "max_steps": 4,
        "gradient_accumulation_steps": 4,
        "model_kwargs": {"mtp_num_steps": 3},
    }
    begin(recipe, False)
    checkpoint(recipe, 2)
    files.release(tmp_path / "out")
    yield recipe
    files.release(tmp_path / "out")


def checkpoint(recipe, step, **found):
    """A checkpoint as a training of `recipe` leaves it."""
    folder = files.Path(recipe["output_dir"]) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    state = {"global_step": step, "max_steps": recipe.get("max_steps", 9)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / RECORD).write_text(json.dumps({"fingerprint": depends_on(recipe) | found}))
    return folder


def test_the_same_command_goes_on(recipe, tmp_path):
    (tmp_path / "rows.jsonl").rename(tmp_path / "other.jsonl")  # another name, the same content
    start = begin(recipe | {"dataset": str(tmp_path / "other.jsonl"), "save_steps": 7}, False)
    assert (start.checkpoint, start.step, start.finished) == (tmp_path / "out" / "checkpoint-2", 2, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 1e-05}, "learning_rate: 0.001 -> 1e-05"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: 4 -> 1"),
        ({"model_kwargs": {"mtp_num_steps": 5}}, "mtp_num_steps: 3 -> 5"),
        ({"model_kwargs": {"mtp_num_steps": 3, "mtp_labels": "kl"}}, 'mtp_labels: none -> "kl"'),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: none -> true"),
        ({"max_steps": 3}, "max_steps: 4 -> 3"),
        ({"max_steps": -1}, "max_steps: 4 -> none"),
        ({"seed": 1}, "seed: none -> 1"),
    ],
)
def test_another_recipe_is_refused_by_name(recipe, change, words):
    for explicit in ({}, {"resume_from_checkpoint": recipe["output_dir"] + "/checkpoint-2"}):
        with pytest.raises(InputError, match="trained with other settings") as error:
            begin(recipe | change | explicit, False)
        assert words in str(error.value) and "--overwrite true" in str(error.value)
    assert (files.Path(recipe["output_dir"]) / "checkpoint-2" / "optimizer.pt").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "model/config.json"])
def test_other_content_under_the_same_name_is_refused(recipe, tmp_path, name):
    (tmp_path / name).write_text('{"x": 2}\n')
    key = "dataset" if name == "rows.jsonl" else "model"
    with pytest.raises(InputError, match=f"{key}: other content"):
        begin(recipe, False)


def test_another_number_of_processes_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    with pytest.raises(InputError, match="processes: 1 -> 2"):
        begin(recipe, False)
    monkeypatch.setenv("NPROC_PER_NODE", "two")
    with pytest.raises(InputError, match="must be whole numbers"):
        processes()


def test_other_kernels_are_no_other_training(recipe):
    head = recipe["model_kwargs"] | {"mtp_flash_attn": True, "mtp_compile": False}
    assert begin(recipe | {"model_kwargs": head}, False).step == 2


def test_longer_is_allowed_and_said(recipe, capsys):
    assert begin(recipe | {"max_steps": 8}, False).step == 2
    assert "longer than before (max_steps: 4 -> 8)" in capsys.readouterr().out


def test_a_finished_run_has_nothing_left_unless_it_shall_be_longer(recipe):
    checkpoint(recipe, 4)
    assert begin(recipe, False).finished
    assert not begin(recipe | {"max_steps": 5}, False).finished


def test_a_checkpoint_cut_short_is_passed_over(recipe, capsys):
    """A kill while checkpoint 4 was written: its state, the last file, is not there or not whole."""
    for content in (None, "", '{"global_step": 4'):
        state = checkpoint(recipe, 4) / "trainer_state.json"
        state.unlink() if content is None else state.write_text(content)
        assert begin(recipe, False).step == 2 and "checkpoint-4" in capsys.readouterr().out
        for path in state.parent.iterdir():
            path.unlink()
        state.parent.rmdir()
    (files.Path(recipe["output_dir"]) / "checkpoint-3").mkdir()  # killed before the first file
    assert begin(recipe, False).step == 2


def test_a_named_checkpoint_must_be_whole(recipe, tmp_path):
    folder = tmp_path / "out" / "checkpoint-2"
    named = recipe | {"resume_from_checkpoint": str(folder)}
    (folder / "optimizer.pt").unlink()
    for settings in (named, recipe):
        with pytest.raises(InputError, match=r"checkpoint-2: no whole optimizer.pt"):
            begin(settings, False)
    (folder / "trainer_state.json").write_text("{")
    with pytest.raises(InputError, match="no whole trainer_state.json"):
        begin(named, False)
    with pytest.raises(InputError, match="no such checkpoint"):
        begin(recipe | {"resume_from_checkpoint": str(tmp_path / "none")}, False)


def test_a_checkpoint_of_nobody_knows_what_is_refused(recipe, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "out" / "checkpoint-2").rename(elsewhere)
    (elsewhere / RECORD).unlink()
    with pytest.raises(InputError, match="no training.json says what"):
        begin(recipe | {"resume_from_checkpoint": str(elsewhere)}, False)


def test_a_named_checkpoint_must_not_push_out_those_of_another_training(recipe, tmp_path):
    other = recipe | {"learning_rate": 0.5, "output_dir": str(tmp_path / "other")}
    begin(other, False)
    checkpoint(other, 2)
    files.release(tmp_path / "other")
    with pytest.raises(InputError, match="a checkpoint of another training"):
        begin(
            other
            | {
                "output_dir": recipe["output_dir"],
                "resume_from_checkpoint": str(tmp_path / "other/checkpoint-2"),
            },
            False,
        )


def test_overwrite_removes_our_checkpoints_and_nothing_else(recipe, tmp_path):
    out = tmp_path / "out"
    (out / "last-checkpoint").symlink_to("checkpoint-2")
    for name in ("logging.jsonl", "notes.txt", "checkpoint-best.txt"):
        (out / name).write_text("{}")
    start = begin(recipe | {"learning_rate": 0.5}, True)
    assert start.checkpoint is None
    left = {path.name for path in out.iterdir()}
    assert left == {"run.json", RECORD, "notes.txt", "checkpoint-best.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_refused_and_stay(recipe, tmp_path, overwrite):
    foreign = tmp_path / "out" / "checkpoint-9"  # rotation would delete it
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="checkpoint-9: not a checkpoint that this project wrote"):
        begin(recipe, overwrite)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.txt").write_text("theirs")
    with pytest.raises(InputError, match="theirs: the folder holds other files"):
        begin(recipe | {"output_dir": str(tmp_path / "theirs")}, overwrite)
    with pytest.raises(InputError, match="not a folder"):
        begin(recipe | {"output_dir": str(tmp_path / "theirs" / "a.txt")}, overwrite)
    assert (foreign / "mine.txt").exists() and (tmp_path / "theirs" / "a.txt").read_text() == "theirs"


def test_the_log_loses_the_steps_that_come_again(recipe, tmp_path):
    log = tmp_path / "out" / "logging.jsonl"
    rows = [{"loss": 1.0, "global_step/max_steps": f"{step}/4"} for step in (1, 2, 3)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    begin(recipe, False)
    assert [json.loads(line) for line in log.read_text().splitlines()] == rows[:2]


def test_two_runs_in_one_folder_are_refused(recipe, tmp_path):
    import fcntl
    import os

    handle = os.open(tmp_path / "out" / "run.json", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(InputError, match="another process is writing"):
        begin(recipe, False)
    os.close(handle)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("torn", [None, 0, 0.9])
def test_a_torn_checkpoint_is_named(recipe, tmp_path, name, torn):
    path = tmp_path / "out" / "checkpoint-2" / name
    if torn is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * torn)])
    with pytest.raises(InputError, match=name.split(".")[0]):
        begin(recipe, False)


def test_overwrite_removes_nothing_of_others(recipe, tmp_path):
    mine = tmp_path / "out" / "checkpoint-2" / "notes.txt"
    mine.write_text("x")
    with pytest.raises(InputError, match="notes.txt"):
        begin(recipe, True)
    assert mine.exists() and (mine.parent / "optimizer.pt").exists()
    mine.unlink()
    mine.parent.rename(tmp_path / "elsewhere")
    mine.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a link"):
        begin(recipe, True)
    assert (tmp_path / "elsewhere" / "optimizer.pt").exists()
    mine.parent.unlink()
    begin(recipe, True)


def test_a_checkpoint_is_no_output_dir(recipe, tmp_path):
    inside = tmp_path / "out" / "checkpoint-2"
    before = {path.name for path in inside.iterdir()}
    with pytest.raises(InputError, match="a checkpoint of another run"):
        begin(recipe | {"output_dir": str(inside)}, False)
    assert {path.name for path in inside.iterdir()} == before


@pytest.mark.parametrize("value", [True, 5, ["a"]])
def test_resume_from_something_else_is_refused(recipe, value):
    with pytest.raises(InputError, match="continues by itself"):
        begin(recipe | {"resume_from_checkpoint": value}, False)
