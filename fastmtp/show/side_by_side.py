"""One answer twice, plain and drafted decoding side by side, with the accepted drafts marked.

On a terminal the drafts are green; elsewhere, or if NO_COLOR is set, they are in brackets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, zip_longest
from typing import TextIO

GREEN, NORMAL = "\x1b[1;32m", "\x1b[0m"
NARROW = 100  # columns; below, the second answer comes under the first
GAP = " | "
GONE = "\ufffd"  # what a decoder shows for a character of which a token holds only a part

Text = list[tuple[str, bool]]  # characters, and whether an accepted draft brought them


def has_colours(stream: TextIO) -> bool:
    """Whether to colour: https://no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def drafted(count: int, accepted: Sequence[int]) -> list[bool]:
    """Of an answer's `count` tokens, which were accepted drafts. accepted: how many each verify pass kept.

    The first token comes from the prefill; each pass ends with a token of the model's own.
    """
    flags = [False]
    for drafts in accepted:
        flags += [True] * drafts + [False]
    return flags[:count]


def text_of(ids: Sequence[int], flags: Sequence[bool], decode: Callable[[Sequence[int]], str]) -> Text:
    """The answer's characters with the flags of their tokens. What a terminal could take for a command is
    left out.
    """
    text, shown = [], 0
    for end, flag in enumerate(flags, 1):
        whole = decode(ids[:end])
        if end < len(flags):
            whole = whole.rstrip(GONE)
        text += [(character, flag) for character in whole[shown:]]
        shown = max(shown, len(whole))
    return [(character, flag) for character, flag in text if character.isprintable() or character == "\n"]


def titled(
    name: str, ids: Sequence[int], accepted: Sequence[int], seconds: float, decode: Callable
) -> tuple[str, Text]:
    """An answer under its name, verify passes and speed; accepted: as for `drafted`."""
    title = f"{name}: {len(accepted)} passes, {len(ids) / seconds:.1f} tokens/s"
    return title, text_of(ids, drafted(len(ids), accepted), decode)


def bracketed(text: Text) -> Text:
    """Accepted drafts marked by characters: "a [draft] b"."""
    result = []
    for flag, run in groupby(text, key=lambda pair: pair[1]):
        marks = [("[", True), ("]", True)] if flag else []
        result += [*marks[:1], *run, *marks[1:]]
    return result


def wrapped(text: Text, width: int) -> Iterator[Text]:
    """`text` in lines of at most `width` characters, broken at spaces if there are any."""
    line: Text = []
    for character, flag in text:
        if character == "\n":
            yield line
            line = []
            continue
        line.append((character, flag))
        if len(line) > width:
            space = max((i for i, (c, _) in enumerate(line) if c == " " and i), default=width)
            yield line[:space]
            line = line[space + (line[space][0] == " ") :]
    yield line


def coloured(line: Text) -> str:
    """A line with its drafts in green."""
    runs = ((flag, "".join(c for c, _ in run)) for flag, run in groupby(line, key=lambda pair: pair[1]))
    return "".join(f"{GREEN}{run}{NORMAL}" if flag else run for flag, run in runs)


def block(title: str, text: Text, width: int, colours: bool) -> list[str]:
    """A titled text as lines that all look `width` characters wide."""
    lines = [[(c, False) for c in title[:width]], *wrapped(text if colours else bracketed(text), width)]
    while len(lines) > 2 and not lines[-1]:
        lines.pop()
    return [
        (coloured(line) if colours else "".join(c for c, _ in line)) + " " * (width - len(line))
        for line in lines
    ]


def comparison(answers: Sequence[tuple[str, Text]], width: int, colours: bool) -> str:
    """One or two answers, each a title and a text: two beside each other if `width` columns are enough."""
    if width < NARROW or len(answers) == 1:
        blocks = ["\n".join(block(title, text, width, colours)) for title, text in answers]
        lines = "\n\n".join(blocks).split("\n")
    else:
        half = (width - len(GAP)) // 2
        left, right = (block(title, text, half, colours) for title, text in answers)
        lines = [GAP.join(pair) for pair in zip_longest(left, right, fillvalue=" " * half)]
    return "\n".join(line.rstrip() for line in lines)
