"""scripts/docs.sh, with a stand-in for .venv's python: what it installs, and what it builds."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
echo "$*" >> calls
case "$*" in "-c import material") exit $MISSING ;; esac
"""


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("words, built", [([], "build"), (["serve"], "serve")])
def test_mkdocs_is_installed_once_and_warnings_are_errors(tmp_path, missing, words, built):
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts" / "docs.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "install.sh").write_text("echo install >> calls\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)

    command = ["sh", "scripts/docs.sh", *words]
    environment = {**os.environ, "MISSING": str(missing)}
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "install" and calls[-1] == f"-m mkdocs {built} --strict"
    assert len([call for call in calls if "pip install" in call and ".[docs]" in call]) == missing
