"""The picture of a speed.json: speed-up against K, one line per draft vocabulary.

    python -m benchmarks.speed.chart results/speed_7b

draws it again, or for the first time if the measuring machine had no matplotlib.
"""

from __future__ import annotations

from pathlib import Path

from fastmtp.cli import Parser, run
from fastmtp.inputs import read_json
from fastmtp.show import plots
from fastmtp.show.plots import plt, style


def draw(report: dict, path: Path) -> None:
    """Measured speed-ups of chains at one stream, and thin what memory bandwidth allows. No picture if
    nothing can be compared with plain decoding.
    """
    alone = [p for p in report["points"] if p["streams"] == 1 and not p["tree"] and not p["adaptive"]]
    drafting = [p for p in alone if p["num_steps"] and p["speedup"]]
    if not drafting:
        return
    plain = next(point for point in alone if point["num_steps"] == 0)
    figure, axes = plt.subplots(figsize=(6.8, 4.4))
    for number, (variant, name) in enumerate(dict.fromkeys((p["variant"], p["map"]) for p in drafting)):
        rows = [p for p in drafting if (p["variant"], p["map"]) == (variant, name)]
        rows.sort(key=lambda p: p["num_steps"])
        ks, look = [p["num_steps"] for p in rows], style(number)
        axes.plot(ks, [p["speedup"] for p in rows], **look, label=f"{variant} {name or 'full'} head".strip())
        bound = [p["tau"] / p["bound_ms"] * plain["bound_ms"] for p in rows]
        axes.plot(ks, bound, color=look["color"], linewidth=1, linestyle=":")
    axes.plot([], [], color="grey", linewidth=1, linestyle=":", label="bandwidth bound")
    axes.axhline(1.0, color="grey", linewidth=1)
    plots.whole_numbers(axes.xaxis)
    axes.set_xlabel("draft steps K")
    axes.set_ylabel("speed-up over plain decoding")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    p = Parser(
        "python -m benchmarks.speed.chart",
        "Draw speed.png from a folder's speed.json.",
        "python -m benchmarks.speed.chart results/speed_7b",
    )
    p.add_argument("folder", help="the --out of benchmarks.speed.run")
    folder = Path(p.parse_args(argv).folder)
    draw(read_json(folder / "speed.json"), folder / "speed.png")


if __name__ == "__main__":
    run(main)
