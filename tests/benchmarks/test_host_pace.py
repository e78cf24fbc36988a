"""The host's pace without a GPU: stand-ins in place of SGLang, asked as the servers would be."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers.stand_in import PAUSE, free_port

from benchmarks import host_pace
from fastmtp.cli import InputError
from fastmtp.engines import sglang
from fastmtp.engines.sglang_flags import SLEEPING

SCRIPT = Path(__file__).parents[1] / "helpers" / "stand_in.py"


@pytest.fixture
def started(monkeypatch):
    """SGLang replaced by stand-ins, of which those that drafts and slept take longer; (point, state)s."""
    monkeypatch.setattr(sglang, "sglang_version", lambda: "0.5.17")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []

    def stand_in(point, folder, port, flags):
        assert flags in ([], SLEEPING)
        seen.append((point.name, "slept" if flags else "awake"))
        slow = "0.02" if flags and point.num_steps else "0.001"
        line = [sys.executable, str(SCRIPT), "--port", str(port), "--num-steps", str(point.num_steps)]
        return ["env", f"{PAUSE}={slow}", *line, "--no-text"]

    monkeypatch.setattr(host_pace, "command", stand_in)
    return seen


def arguments(out, *more):
    short = ["--shape", "tiny", "--points", "plain,3", "--rounds", "2", "--requests", "1", "--tokens", "128"]
    return [*short, "--port", str(free_port()), "--out", str(out), *more]


def test_awake_and_slept_servers_are_asked_in_turns(started, tmp_path, capsys):
    host_pace.main(arguments(tmp_path / "out"))
    assert started == [(name, state) for name in ("baseline", "k3-full") for state in ("awake", "slept")]
    found = json.loads((tmp_path / "out" / "host_pace.json").read_text())
    ms = {(row["point"], row["server"]): row["ms"] for row in found["cycles"]}
    assert all(len(values) == 2 for values in ms.values())
    assert sum(ms["k3-full", "slept"]) > 2 * sum(ms["k3-full", "awake"])
    cpus = len(os.sched_getaffinity(0))
    assert [len(speeds) for speeds in found["processors"]] == [cpus, cpus] and min(found["processors"][0]) > 0
    text = capsys.readouterr().out
    assert "| k3-full | slept | 2 |" in text and f"on each of {cpus} processors" in text
    assert text.strip() == (tmp_path / "out" / "host_pace.md").read_text().strip()
    assert (tmp_path / "out" / "run.json").exists()


def test_wrong_use_and_dead_servers_end_in_one_line(started, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--rounds must be at least 1"):
        host_pace.main(arguments(tmp_path / "out", "--rounds", "0"))
    dead = [sys.executable, "-c", "raise SystemExit('no such kernel')"]
    monkeypatch.setattr(host_pace, "command", lambda *_: dead)
    with pytest.raises(SystemExit, match="host_pace: error: the server ended with exit code 1"):
        host_pace.main(arguments(tmp_path / "out"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU here"):
        host_pace.main(arguments(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
