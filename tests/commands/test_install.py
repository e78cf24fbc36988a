"""scripts/install.sh, with stand-ins for python3, pip and nvidia-smi: what it asks pip for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = "https://download.pytorch.org/whl/cpu"
# `python3 -m venv` puts the stand-in into .venv; `pip install` notes its words, and fails for a dead index.
PYTHON = """#!/bin/sh
case "$*" in
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-c import torch") exit 1 ;;
"-m compileall"*) exit 1 ;; # some packages hold files that do not compile
"-m pip install"*) echo "$*" >> calls; case "$*" in *"$DEAD"*) exit 1 ;; esac ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """Runs install.sh in a copy of the checkout; returns (exit code, stderr, what pip was asked for)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts" / "install.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("sh", "cat", "cksum", "grep", "mkdir", "cp", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)

    def run(gpu: bool = False, dead: str = "nothing", **variables: str) -> tuple[int, str, list[str]]:
        if gpu:
            (tmp_path / "bin" / "nvidia-smi").symlink_to("/bin/true")
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {"PATH": str(tmp_path / "bin"), "HOME": os.environ.get("HOME", "/"), "DEAD": dead}
        command = ["sh", "scripts/install.sh"]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment | variables, stderr=subprocess.PIPE, text=True
        )
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return result.returncode, result.stderr, calls

    return run


def test_without_a_gpu_the_cpu_build_comes_first_and_a_second_call_does_nothing(install):
    code, _, calls = install()
    assert code == 0 and CPU in calls[0] and "torch==" in calls[0] and "--no-deps" in calls[0]
    assert "--editable" in calls[1] and CPU not in " ".join(calls[1:])
    assert install() == (0, "", [])


@pytest.mark.parametrize("how", [{"gpu": True}, {"TORCH_INDEX": ""}])
def test_with_a_gpu_or_on_request_pip_chooses(install, how):
    code, _, calls = install(**how)
    assert code == 0 and "--editable" in calls[0] and "--index-url" not in " ".join(calls)


def test_another_index_is_taken_and_one_that_does_not_answer_is_said(install):
    code, err, calls = install(TORCH_INDEX="https://mirror.example/cpu", dead="mirror.example")
    assert code == 0 and "https://mirror.example/cpu" in calls[0] and "--editable" in calls[1]
    assert "no torch==" in err and "CUDA build" in err


def test_what_failed_is_tried_again(install):
    code, _, _ = install(dead="--editable")
    assert code != 0
    assert len(install()[2]) == 3


def test_an_old_python_is_one_line(install, tmp_path):
    (tmp_path / "bin" / "python3").write_text('#!/bin/sh\ncase "$1" in -c) exit 1 ;; esac\n')
    code, err, calls = install()
    assert code == 2 and err.count("\n") == 1 and "3.11" in err and calls == []
