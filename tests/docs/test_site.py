"""The site builds without a warning, and shows every command as its parser explains it."""

import html
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtp.cli import COMMANDS

pytest.importorskip("material", reason="mkdocs-material: sh scripts/docs.sh installs it")
pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "WARNING" not in result.stderr
    return folder


def test_every_command_with_its_help(site, monkeypatch):
    page = html.unescape((site / "cli" / "index.html").read_text(encoding="utf-8"))
    monkeypatch.setenv("COLUMNS", "84")
    for name, command in COMMANDS.items():
        assert f">fastmtp {name}" in page
        module = importlib.import_module(command.module)
        if name != "bench":
            assert module.parser().format_help().rstrip() in page


def test_a_link_out_of_the_docs_leads_to_a_page(site):
    page = (site / "how_it_works" / "index.html").read_text(encoding="utf-8")
    assert 'href="../results/ablation_smollm2/"' in page and "source/fastmtp/head/recursion.py/" in page
    source = site / "source" / "fastmtp" / "head" / "recursion.py" / "index.html"
    assert ">layout</span>" in source.read_text(encoding="utf-8")


def test_no_mark_of_the_tests_and_no_drawing_script_is_shown(site):
    texts = [path.read_text(encoding="utf-8") for path in site.glob("*/index.html")]
    assert len(texts) > 12 and not any("```" in text for text in texts)
    assert list((site / "figures").glob("*.svg")) and not list((site / "figures").glob("*.py"))
