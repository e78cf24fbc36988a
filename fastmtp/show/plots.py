"""Charts: matplotlib without a screen, colours that colour-blind readers can tell apart.

It needs matplotlib: import this module only in code that draws.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from fastmtp.files import atomic  # noqa: E402

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


def style(number: int) -> dict[str, str]:
    """Colour and marker of line `number`, as keyword arguments of `plot`."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def whole_numbers(axis) -> None:
    """Ticks at whole numbers only: `whole_numbers(axes.xaxis)`."""
    axis.set_major_locator(MaxNLocator(integer=True))


def save(figure, path: str | Path) -> None:
    """Write a PNG file whole or not at all, and free the figure."""
    try:
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=130, bbox_inches="tight", format="png")
    finally:
        plt.close(figure)
