"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import io
import sys

from tqdm import tqdm

EVERY = 30.0  # seconds between two plain lines; shorter work prints none


class Bar(tqdm):
    """tqdm for stderr. In a log file or a pipe it draws nothing over and over: it prints lines."""

    def __init__(self, *args, **settings):
        self.plain = not sys.stderr.isatty()
        if self.plain:
            settings |= {"file": io.StringIO(), "mininterval": EVERY, "delay": EVERY, "leave": False}
        super().__init__(*args, **settings, disable=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.plain:
            super().display(msg, pos)
        elif msg is None:
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """'distill: 120 of 400, 2.5 prompt/s, 01:52 left'."""
        facts = self.format_dict
        number = self.format_sizeof if facts["unit_scale"] else "{:.4g}".format
        done = facts["n"] - facts["initial"]
        rate = facts["rate"] or done / (facts["elapsed"] or 1e-9)
        name = f"{facts['prefix']}: " if facts["prefix"] else ""
        of = f" of {number(facts['total'])}" if facts["total"] else ""
        text = f"{name}{number(facts['n'])}{of}, {number(rate)} {facts['unit']}/s"
        if facts["total"] and rate:
            text += f", {self.format_interval((facts['total'] - facts['n']) / rate)} left"
        return text
