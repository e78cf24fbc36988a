"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def grid(head: Sequence[str], rows: Sequence[Sequence[object]], text: int | None = None) -> str:
    """A table, without a newline at its end. The first `text` columns are text and lie left, numbers after
    them lie right; None: all are text.
    """
    rule = ["---" if text is None or column < text else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in [head, rule, *rows])


def number(value: float | None, form: str) -> str:
    """`value` in a format such as ".2f"; "-" if it is unknown."""
    return "-" if value is None else format(value, form)


def interval(bounds: Sequence[float] | None, form: str) -> str:
    """Its two bounds in a format such as ".2f"; "-" if it is unknown."""
    return "-" if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def spanned(value: float | None, bounds: Sequence[float] | None, form: str) -> str:
    """`value` and its interval, both in a format such as ".2f"; without what is unknown."""
    if value is None or bounds is None:
        return number(value, form)
    return f"{value:{form}} ({interval(bounds, form)})"


def around(percentiles: Sequence[float] | None, form: str) -> str:
    """[low, median, high] as the median and the other two around it."""
    low, middle, high = percentiles or [None] * 3
    return spanned(middle, percentiles and [low, high], form)


def _cell(value: object) -> str:
    """One line, without the sign that ends a cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
