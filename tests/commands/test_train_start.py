"""The start of a training: its time by phase, and the process that imports ms-swift while rows are read."""

import signal

import pytest

from fastmtp.data.start_up import VARIABLE, StartUp
from fastmtp.swift_process import RECIPE, launch, stop, wait


@pytest.fixture
def clock(monkeypatch):
    """Moves the time that a start-up sees."""
    now = [100.0]
    monkeypatch.setattr("time.time", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> dict:
    for name in ("NPROC_PER_NODE", "NNODES", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return {"output_dir": str(tmp_path / "out")}


def test_phases_add_up_across_processes(clock, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    first = StartUp(since=90.0)
    first.lap("imports")
    clock(2.5)
    first.lap("rows")
    first.write(tmp_path)
    clock(0.5)
    second = StartUp.read(tmp_path)
    second.lap("imports")  # it was not ready when the rows were
    second.hand_on()
    clock(4)
    third = StartUp.taken()
    third.lap("model")
    assert third.line() == "start-up 17.0 s: imports 10.5, rows 2.5, model 4.0"


def test_without_a_start_the_count_begins_now(clock, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    start_up = StartUp.taken()
    clock(1.0)
    start_up.lap("model")
    assert start_up.seconds == {"model": 1.0}


def test_a_process_that_waits_is_gone_when_the_rows_are_refused(recipe, tmp_path):
    with launch(recipe, tmp_path) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_waits_ends_with_its_command(tmp_path, monkeypatch):
    """Also below torchrun, which outlives the command: its parent then stays the same."""
    monkeypatch.setattr("fastmtp.swift_process.is_running", lambda process: process != 5)
    monkeypatch.setenv("FASTMTP_PARENT", "5")
    with pytest.raises(SystemExit):
        wait(tmp_path)
    monkeypatch.setenv("FASTMTP_PARENT", "6")
    (tmp_path / RECIPE).write_text("")
    wait(tmp_path)


def test_a_process_that_trains_may_end_by_itself(recipe, tmp_path):
    with launch(recipe, tmp_path) as process:
        (tmp_path / RECIPE).write_text("")
        stop(process, begun=True)
    assert process.returncode == -signal.SIGTERM


def test_the_recipe_s_environment_counts_unless_the_shell_says_otherwise(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SAID", "shell")
    seen = {}

    def popen(command, env, **others):
        seen.update(env, command=command)
        raise InterruptedError

    monkeypatch.setattr("subprocess.Popen", popen)
    with pytest.raises(InterruptedError), launch(recipe | {"ENV": {"SAID": "recipe", "ALSO": 1}}, tmp_path):
        pass
    assert (seen["SAID"], seen["ALSO"]) == ("shell", "1") and "torch.distributed.run" not in seen["command"]
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    with pytest.raises(InterruptedError), launch(recipe, tmp_path):
        pass
    command = seen["command"]
    assert command[2:5] == ["torch.distributed.run", "--nproc_per_node=2", "-m"]
    assert command[5:] == ["fastmtp.swift_process", str(tmp_path)]
