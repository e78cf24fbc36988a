"""Progress: a bar on a terminal, plain lines in a log."""

import io
import sys
import time

import pytest

from fastmtp.show import progress
from fastmtp.show.progress import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, bars", [(Terminal, True), (io.StringIO, False)])
def test_a_log_gets_lines_and_a_terminal_a_bar(stream, bars, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for _ in Bar(range(3), desc="fit", unit="text", mininterval=0):
        time.sleep(0.001)
    text = sys.stderr.getvalue()
    assert ("\r" in text) is bars and ("it/s" not in text)
    if bars:
        assert "3/3" in text and "text/s" in text
    else:
        lines = text.splitlines()
        assert lines[-1].startswith("fit: 3 of 3, ") and lines[-1].endswith("text/s, 00:00 left")


def test_short_work_prints_no_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Bar(total=5, desc="distill", unit="prompt") as bar:
        bar.update(5)
    assert sys.stderr.getvalue() == "" and bar.n == 5


def test_a_resumed_run_counts_its_own_rate(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Bar(total=5000, initial=4000, desc="count", unit="B", unit_scale=True) as bar:
        bar.start_t = bar._time() - 10  # ten seconds ago
        bar.n = 4500
        assert bar.line() == "count: 4.50k of 5.00k, 50.0 B/s, 00:10 left"
