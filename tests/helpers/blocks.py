"""The fenced blocks of a page, and whether a test runs what they show.

`<!-- not run: REASON -->` on the line before a block of `sh` says that no test runs it; its commands are
still given to the real parsers. REASON is one of NOT_RUN.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_RUN = {
    "needs a GPU": "",
    "needs the Hub": "",  # the data sets of the benchmarks, a tokenizer
    "needs a running server": "",
    "needs vLLM": "tests/engines/test_vllm_real.py",
    "needs minutes of two cores": ".ci/run",
}
# The pages whose blocks a test runs, in this order, in one folder
RUN = ("data.md", "train.md", "stale_head.md", "engines.md", "language.md", "your_model.md")
FENCE = re.compile(r"(?:^<!-- not run: (.*?) -->\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """language: "" if none is given; not_run: the reason, None if a test runs it; line: from 1."""

    language: str
    text: str
    not_run: str | None
    line: int
    before: str

    def commands(self) -> list[list[str]]:
        """Its command lines as words, comments left out."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(match[2], match[3], match[1], text[: match.start()].count("\n") + 1, text[: match.start()])
        for match in FENCE.finditer(text)
    ]


def pages() -> list[Path]:
    """README and the pages of docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
