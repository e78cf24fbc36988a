"""Provenance: the command, the commit and whether the checkout had changes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtp.files import (
    provenance,
    sha256,
    write_provenance,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def test_provenance_says_what_made_it(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    (tmp_path / "folder").mkdir()
    for output, record in (
        (tmp_path / "out.jsonl", "out.jsonl.run.json"),
        (tmp_path / "folder", "folder/run.json"),
    ):
        write_provenance(output, {"seed": 3}, [source, tmp_path / "none"])
        found = json.loads((tmp_path / record).read_text())
        assert found["config"] == {"seed": 3} and found["inputs"] == {str(source): sha256(source)}
        assert found["versions"]["torch"]


def test_provenance_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = provenance({"seed": 0})
    assert found["git_commit"] is None and found["config"] == {"seed": 0}


@pytest.fixture
def clone(tmp_path):
    """A small checkout: what tells its state, committed. Gives (folder, git_state in it)."""
    root = tmp_path / "clone"
    (root / "fastmtp").mkdir(parents=True)
    for name in (".gitignore", "pyproject.toml", *(f"fastmtp/{n}.py" for n in ("__init__", "checkout"))):
        shutil.copy(REPOSITORY / name, root / name)

    def state(**environment: str) -> dict:
        code = "import json; from fastmtp.checkout import git_state; print(json.dumps(git_state()))"
        variables = {**os.environ, "PYTHONPATH": str(root), **environment}
        command = [sys.executable, "-c", code]
        return json.loads(subprocess.check_output(command, env=variables, cwd=tmp_path))

    commit(root)
    return root, state


def commit(root: Path) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "m"]):
        subprocess.run(["git", *words], cwd=root, check=True)


def test_git_state_of_a_clone(clone, tmp_path):
    root, state = clone
    clean = state()
    assert len(clean["git_commit"]) == 40 and clean["git_dirty"] is False
    (root / "data").mkdir()
    (root / "data" / "mine.jsonl").write_text("{}")
    assert state() == clean  # one's own data is no change of the code
    (root / "fastmtp" / "new.py").write_text("x = 1\n")
    assert state() == clean | {"git_dirty": True}
    (root / "fastmtp" / "new.py").unlink()
    (root / "fastmtp" / "checkout.py").write_text((root / "fastmtp" / "checkout.py").read_text() + "# x\n")
    assert state() == clean | {"git_dirty": True}
    (tmp_path / "other").mkdir()
    commit_of_hook = {"GIT_DIR": str(tmp_path / "other" / ".git"), "GIT_WORK_TREE": str(tmp_path / "other")}
    assert state(**commit_of_hook) == clean | {"git_dirty": True}


def test_somebody_elses_repository_is_not_reported(clone, tmp_path):
    root, state = clone
    shutil.rmtree(root / ".git")
    commit(tmp_path)  # the folder around it: a vendored copy, or site-packages inside a project
    assert state() == {"git_commit": None, "git_dirty": None}
    (root / "pyproject.toml").write_text("[project]\nname = 'theirs'\n")
    commit(root)
    assert state() == {"git_commit": None, "git_dirty": None}


@pytest.mark.parametrize(
    "program, expected",
    [
        (str(REPOSITORY / "evaluation" / "run.py"), "python -m evaluation.run --x 'a b'"),
        (str(REPOSITORY / "benchmarks" / "speed" / "run.py"), "python -m benchmarks.speed.run --x 'a b'"),
        (str(REPOSITORY / "fastmtp" / "train.py"), "python -m fastmtp.train --x 'a b'"),
        ("/home/u/.venv/bin/fastmtp", "fastmtp --x 'a b'"),
        (str(REPOSITORY / ".venv" / "lib" / "tool.py"), "tool.py --x 'a b'"),
        ("-c", "python -c --x 'a b'"),
    ],
)
def test_the_recorded_command_holds_no_path_of_the_machine(monkeypatch, program, expected):
    monkeypatch.setattr(sys, "argv", [program, "--x", "a b"])
    assert provenance({})["command"] == expected


def test_a_bench_script_started_in_its_own_folder_is_recorded_by_its_module(monkeypatch):
    monkeypatch.chdir(REPOSITORY / "evaluation" / "mt_bench")
    monkeypatch.setattr(sys, "argv", ["bench_sglang_eagle.py"])
    assert provenance({})["command"] == "python -m evaluation.mt_bench.bench_sglang_eagle"
