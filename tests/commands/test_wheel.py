"""The wheel alone, without a checkout, finds its recipes, prompts, token maps and evaluation."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fastmtp

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a folder of its own: what an earlier build left in the checkout must not get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "build.cfg").write_text(f"[build]\nbuild_base={folder}/build\n[egg_info]\negg_base={folder}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ".",
    ]
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(folder / "build.cfg")}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs Python with `words` in an empty folder, with the wheel in place of the checkout."""
    root = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "site")
    (root / "empty").mkdir()
    # Before the site-packages of this interpreter, in which the checkout may be installed as editable.
    path = os.pathsep.join([str(root / "site"), sysconfig.get_paths()["purelib"]])

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-S", *words]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, cwd=root / "empty", env=environment, capture_output=True, text=True)

    return run


def test_the_wheel_holds_every_shipped_file_and_no_other_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.split()
    code = {name for name in tracked if name.startswith(("fastmtp/", "evaluation/")) and name.endswith(".py")}
    data = {
        f"fastmtp/resources/{name}"
        for name in tracked
        if name.startswith(("configs/", "vocab/", "examples/")) and not name.endswith((".md", ".png"))
    }
    heads = {name for name in tracked if name.startswith("fastmtp/heads/")}
    assert (code | data | heads | {"fastmtp/py.typed"}) - names == set()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastmtp", "evaluation"}


def test_one_version_everywhere(wheel):
    heading = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert heading and heading[1] == fastmtp.__version__ == wheel.name.split("-")[1]


def test_shipped_files_are_found_outside_the_checkout(installed):
    code = "from fastmtp import checkout, inputs\n" + "\n".join(
        f"assert (path := inputs.resource('{name}')).is_file() and path.is_absolute(), '{name}'"
        for name in (
            "configs/quickstart.yaml",
            "examples/prompts.jsonl",
            "vocab/smollm2/en_8k.pt",
            "fastmtp/train.py",
        )
    )
    result = installed("-c", code + "\nprint(checkout.checkout(), checkout.git_state())")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "None {'git_commit': None, 'git_dirty': None}\n"


def test_the_commands_run_from_the_wheel(installed, base_folder):
    """In one process, as loading torch takes seconds: (words, exit code), and what stderr may not say."""
    model, vocab = str(base_folder), "vocab/smollm2/en_8k.pt"
    asking = (
        f"distill --model {model} --prompts examples/prompts.jsonl --limit 1 --max-new-tokens 2 --out d.jsonl"
    )
    commands = [
        ("--version", 0),
        ("bench mt_bench --help", 0),
        ("evaluate --help", 0),
        ("train --help", 0),
        ("ablation --help", 2),  # an experiment of the checkout
        (f"{asking} --dtype float32", 0),
        ("curate --input d.jsonl --recipe configs/quickstart_curate.yaml --out data", None),
        (f"serve --model {model} --dry-run --token-map {vocab}", 2),  # of SmolLM2's ids, or no SGLang here
    ]
    code = f"""
import sys
from fastmtp import cli
from fastmtp.inputs import resource
for words, expected in {commands!r}:
    sys.argv = ["fastmtp", *words.split()]
    try:
        cli.entry()
    except SystemExit as end:
        assert expected in (None, end.code), (words, end.code)
"""
    result = installed("-c", code)
    assert result.returncode == 0, result.stderr
    assert "checkout" in result.stderr and "no such" not in result.stderr and "Traceback" not in result.stderr
