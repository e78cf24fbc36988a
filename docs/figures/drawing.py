"""A sheet to draw on: boxes, words and arrows, written as one small SVG file.

The sheet is white, so that a figure reads on a dark page too. Coordinates are pixels from the top left.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, GREY, PALE = "#1a1a1a", "#6b7280", "#f3f4f6"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito, as in fastmtp/show/plots.py
TINTS = {BLUE: "#dbeafe", ORANGE: "#fde4d3", GREEN: "#d5f0e6", GREY: PALE}
SANS = "font-family='Helvetica, Arial, sans-serif'"
MONO = "font-family='Menlo, Consolas, DejaVu Sans Mono, monospace'"


class Sheet:
    """One figure of `width` x `height` pixels; `title` is what a screen reader says."""

    def __init__(self, width: int, height: int, title: str):
        self.size = (width, height)
        self.parts = [
            f"<title>{escape(title)}</title>",
            f"<rect width='{width}' height='{height}' rx='8' fill='white'/>",
        ]

    def text(self, x, y, words, size=14, colour=INK, mono=False, bold=False, anchor="middle") -> None:
        """`words` with their base line at y."""
        face = MONO if mono else SANS
        weight = " font-weight='bold'" if bold else ""
        self.parts.append(
            f"<text x='{x}' y='{y}' {face} font-size='{size}' fill='{colour}' text-anchor='{anchor}'{weight}>"
            f"{escape(words)}</text>"
        )

    def box(self, x, y, width, height, colour=GREY, fill=None, dashed=False) -> None:
        dash = " stroke-dasharray='4 3'" if dashed else ""
        self.parts.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='5' "
            f"fill='{fill or TINTS[colour]}' stroke='{colour}' stroke-width='1.3'{dash}/>"
        )

    def node(self, x, y, width, height, words, colour=GREY, size=14, mono=False, bold=False, dashed=False):
        """A box with `words` in its middle; two lines if they hold a line break."""
        self.box(x, y, width, height, colour, dashed=dashed)
        lines = words.split("\n")
        top = y + height / 2 + size * 0.36 - (len(lines) - 1) * size * 0.65
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + number * size * 1.3, line, size, mono=mono, bold=bold)

    def arrow(self, *points: tuple[float, float], colour=INK) -> None:
        """A line through `points` with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        x2, y2 = x1 - 8 * dx, y1 - 8 * dy  # the head's base
        tip = f"{x1},{y1} {x2 - 4 * dy},{y2 + 4 * dx} {x2 + 4 * dy},{y2 - 4 * dx}"
        self.parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.4'/>")
        self.parts.append(f"<polygon points='{tip}' fill='{colour}'/>")

    def save(self, path: Path) -> None:
        width, height = self.size
        frame = f"viewBox='0 0 {width} {height}' width='{width}' role='img'"
        head = f"<svg xmlns='http://www.w3.org/2000/svg' {frame}>"
        path.write_text("\n".join([head, *self.parts, "</svg>"]) + "\n", encoding="utf-8")
