"""speed.svg: speed-up against K, from the table in results/speed_7b/README.md. Run it to draw it again."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib import pyplot as plt

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parents[1] / "results" / "speed_7b" / "README.md"
LINES = (("full, 152k", "whole vocabulary", "#0072B2", "o"), ("32k", "32k token map", "#009E73", "^"))


def table(text: str) -> dict[str, list[float]]:
    """{column: speed-up at K=1, 2, ...} of the page's first table."""
    rows = [
        [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| *(K|\**\d)", line)
    ]
    header, body = rows[0], rows[1 : next(i for i, row in enumerate(rows) if i and row[0] == "K")]
    return {
        name: [float(re.match(r"[\d.]+", row[column])[0]) for row in body]
        for column, name in enumerate(header)
        if column > 1
    }


def draw(columns: dict[str, list[float]], path: Path) -> None:
    plt.rcParams |= {"svg.hashsalt": "speed", "svg.fonttype": "none", "font.size": 11}
    figure, axes = plt.subplots(figsize=(7.2, 3.9), facecolor="white")
    for column, label, colour, marker in LINES:
        ks = range(1, len(columns[column]) + 1)
        axes.plot(ks, columns[column], color=colour, marker=marker, linewidth=2)
        axes.annotate(label, (ks[-1], columns[column][-1]), (9, -4), textcoords="offset points", color=colour)
    best = columns["32k"]
    for k in (3, 4):
        axes.annotate(f"{best[k - 1]:.2f}x", (k, best[k - 1]), (-4, 8), textcoords="offset points")
    axes.axhline(1, color="grey", linewidth=1)
    axes.annotate("plain decoding", (7, 1), (12, -4), textcoords="offset points", color="grey")
    axes.set(xlim=(0.7, 7.15), ylim=(0.9, 2.4), xlabel="drafts per cycle K", ylabel="times as fast as plain")
    axes.set_title(
        "MiMo-7B's shape on one H200, one stream: times measured, accept lengths simulated",
        fontsize=10,
        pad=12,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(table(RESULTS.read_text(encoding="utf-8")), FOLDER / "speed.svg")
