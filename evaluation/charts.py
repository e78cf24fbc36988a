"""Pictures of a table.json: speed-up by task, accept length and speed against K, acceptance by position,
throughput against requests at a time.

    python -m evaluation.charts results/NAME

draws them again, or for the first time if the measuring machine had no matplotlib.
"""

from __future__ import annotations

import math
from pathlib import Path

from evaluation.page import pictures
from fastmtp.cli import InputError, Parser, run
from fastmtp.files import is_ours
from fastmtp.inputs import existing, read_json
from fastmtp.show import plots
from fastmtp.show.plots import plt, style

LINES = ["-", "--", "-.", ":"]


def draw(report: dict, out: Path) -> list[Path]:
    """The pictures of `page.pictures` in `out`; older ones of these names that are ours are removed."""
    arms = [name for name in report["arms"] if name != "baseline"]
    names = pictures(report)
    for name, figure in DRAWN.items():
        if name in names:
            plots.save(figure(report, arms), out / name)
        elif (out / name).exists() and is_ours(out / name):
            (out / name).unlink()  # of another table: nobody must take it for this one's
    return [out / name for name in names]


def radar(report: dict, arms: list[str]):
    """Speed-up by task, one outline per head and map, at its fastest K: with all of them nobody sees one.

    With fewer than three tasks there is no outline, so bars.
    """
    tasks, speed_of = report["tasks"], {name: report["average"][name]["speedup"] for name in arms}
    families = _families(report, arms).values()
    arms = [max((name for _, name in members), key=speed_of.get) for members in families]
    speed = {name: [report["cells"][name][task]["speedup"] for task in tasks] for name in arms}
    names = [report["titles"][task] for task in tasks]
    looks = _looks(report, arms)
    if len(tasks) < 3:
        figure, axes = plt.subplots(figsize=(6.4, 4.2))
        width = 0.8 / len(arms)
        for number, name in enumerate(arms):
            places = [x + (number - (len(arms) - 1) / 2) * width for x in range(len(tasks))]
            bars = axes.bar(places, speed[name], width * 0.92, label=name, color=looks[name]["color"])
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
            for bar in bars:
                bar.set_alpha(looks[name]["alpha"])
        axes.set_xticks(range(len(tasks)), names)
        axes.axhline(1.0, color="grey", linewidth=1)
        axes.set_ylabel("speed-up over plain decoding, fastest K")
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
        return figure
    angles = [2 * math.pi * n / len(tasks) for n in range(len(tasks))]
    figure, axes = plt.subplots(figsize=(7.2, 5.6), subplot_kw={"projection": "polar"})
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    closed = [*angles, angles[0]]
    axes.plot(closed, [1.0] * len(closed), color="grey", linewidth=1.2, label="plain decoding")
    for name in arms:
        axes.plot(
            closed, [*speed[name], speed[name][0]], **looks[name], linewidth=1.8, markersize=4, label=name
        )
    axes.set_xticks(angles, names, fontsize=9)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)  # labels on the right begin at the circle, those on the left end there
        label.set_horizontalalignment("left" if side > 0.1 else "right" if side < -0.1 else "center")
    top = max(1.0, *(value for values in speed.values() for value in values))
    axes.set_ylim(0, top * 1.08)
    axes.set_rlabel_position(180 / len(tasks))
    axes.tick_params(axis="y", labelsize=7, colors="#555555")
    axes.set_title("speed-up over plain decoding, fastest K", fontsize=11, pad=14)
    axes.legend(loc="center left", bbox_to_anchor=(1.3, 0.5), fontsize=8, frameon=False)
    return figure


def steps(report: dict, arms: list[str]):
    """Mean accept length and mean speed-up (tokens/s without a baseline) against K, one line for each head
    and map.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.0))
    has_speedup = all(report["average"][name]["speedup"] for name in arms)
    key = "speedup" if has_speedup else "throughput"
    families = _families(report, arms)
    for number, (family, members) in enumerate(families.items()):
        ks = [k for k, _ in members]
        for axes, what in ((left, "accept_length"), (right, key)):
            values = [report["average"][name][what] for _, name in members]
            axes.plot(ks, values, **style(number), label=family)
    every = sorted({k for members in families.values() for k, _ in members})
    for axes in (left, right):
        axes.set_xticks(every)
        axes.set_xlabel("draft steps K")
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    left.set_ylabel("accept length (tokens per verify pass)")
    right.set_ylabel("speed-up over plain decoding" if has_speedup else "tokens/s")
    if has_speedup:
        right.axhline(1.0, color="grey", linewidth=1)
    right.legend(fontsize=8)
    figure.tight_layout()
    return figure


def acceptance(report: dict, arms: list[str]):
    """Share of verify passes that accept position i, pooled over tasks; each family's longest chain."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for number, members in enumerate(_families(report, arms).values()):
        _, name = members[-1]
        rates = report["position_rates"][name]
        if not rates:  # the engine did not say
            continue
        axes.plot(range(1, len(rates) + 1), rates, **style(number), label=name)
    axes.set_ylim(0, 1)
    axes.set_xlabel("draft position")
    axes.set_ylabel("share of verify passes that accept it")
    plots.whole_numbers(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def streams(report: dict, arms: list[str]):
    """Tokens per second of all streams, and speed-up over plain decoding, against requests at a time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.0))
    levels = sorted({row["streams"] for row in report["streams"]})
    measured = {row["arm"] for row in report["streams"]}
    looks = _looks(report, [name for name in arms if name in measured]) | {
        "baseline": {"color": "grey", "marker": "."}
    }
    for name in dict.fromkeys(row["arm"] for row in report["streams"]):
        by = {row["streams"]: row for row in report["streams"] if row["arm"] == name}
        for axes, what in ((left, "throughput"), (right, "speedup")):
            points = [(level, by[level][what]) for level in levels if by.get(level, {}).get(what)]
            if points:
                axes.plot(*zip(*points, strict=True), **looks[name], label=name)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.minorticks_off()
        axes.set_xlabel("requests at a time")
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.set_ylabel("tokens/s, all requests together")
    right.set_ylabel("speed-up over plain decoding")
    left.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _families(report: dict, arms: list[str]) -> dict[str, list[tuple[int, str]]]:
    """`fastmtp+en32k` -> [(1, "fastmtp:1+en32k"), ...], by K."""
    families: dict[str, list[tuple[int, str]]] = {}
    for name in arms:
        k = report["cells"][name][report["tasks"][0]]["num_steps"]
        family = name.replace(f":{k}", "", 1)
        families.setdefault(family, []).append((k, name))
    return {family: sorted(members) for family, members in families.items()}


def _looks(report: dict, arms: list[str]) -> dict[str, dict]:
    """A colour and marker for each head and map; its largest K drawn solid, smaller ones broken and paler."""
    looks = {}
    for number, members in enumerate(_families(report, arms).values()):
        for rank, (_, name) in enumerate(reversed(members)):
            fade = {"linestyle": LINES[rank % len(LINES)], "alpha": max(0.35, 1 - 0.25 * rank)}
            looks[name] = style(number) | fade
    return looks


DRAWN = {"radar.png": radar, "steps.png": steps, "acceptance.png": acceptance, "streams.png": streams}


def draw_folder(folder: str | Path) -> list[Path]:
    """Draw what the folder's table.json holds; the pictures made. Raises InputError without one."""
    folder = existing(folder, "results folder")
    path = folder / "table.json"
    if not path.exists():
        raise InputError(f"{folder}: no table.json; give the --out of evaluation.run")
    report = read_json(path)
    try:
        return draw(report, folder)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not a table that this project wrote ({reason})") from None


def main(argv: list[str] | None = None) -> None:
    p = Parser(
        "python -m evaluation.charts",
        "Draw a results folder's pictures.",
        "python -m evaluation.charts results/NAME",
    )
    p.add_argument("folder", metavar="FOLDER")
    for path in draw_folder(p.parse_args(argv).folder):
        print(path)


if __name__ == "__main__":
    run(main)
