"""What token maps cover of held-out text: shares, the printed table, the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastmtp import files
from fastmtp.vocab.lang import OTHER
from fastmtp.vocab.token_counts import Counts
from fastmtp.vocab.token_map import size_name

UNION = "union"


def coverage(ids: np.ndarray, counted: np.ndarray) -> float | None:
    """Share of a count's tokens that are in the map; None for an empty count."""
    total = counted.sum()
    return float(counted[ids].sum() / total) if total else None


def left_out(counts: Counts, langs: list[str]) -> str | None:
    """One line about text for which no map was made; None if there is none."""
    rest = {lang: int(table.sum()) for lang, table in counts.tables.items() if lang not in langs}
    about = {OTHER: " in scripts that we cannot tell apart"}
    parts = [f"{lang} {tokens} tokens{about.get(lang, '')}" for lang, tokens in rest.items() if tokens]
    return f"left out, no map made: {', '.join(parts)}" if parts else None


def table(
    maps: dict[str, np.ndarray], held_out: dict[str, np.ndarray], compared: dict[str, np.ndarray]
) -> str:
    """Coverage of each map (rows) on each language's held-out text (columns); what languages' maps share."""
    width = max(map(len, ["held-out tokens", *maps, *compared]))
    lines = [f"{'map':<{width}} {'ids':>7}" + "".join(f"{lang:>9}" for lang in held_out)]
    lines.append(
        f"{'held-out tokens':<{width}} {'':>7}" + "".join(f"{t.sum():>9}" for t in held_out.values())
    )
    for name, ids in [*maps.items(), *compared.items()]:
        shares = [coverage(ids, tokens) for tokens in held_out.values()]
        cells = "".join(f"{'-':>9}" if share is None else f"{100 * share:>8.2f}%" for share in shares)
        lines.append(f"{name:<{width}} {len(ids):>7}{cells}")
    names = [name for name in maps if not name.startswith(UNION)]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if len(maps[one]) == len(maps[other]):
                shared = len(np.intersect1d(maps[one], maps[other]))
                lines.append(f"{one} and {other} share {shared} ids ({100 * shared / len(maps[one]):.1f}%)")
    return "\n".join(lines)


def plot(
    path: Path, rankings: dict[str, np.ndarray], held_out: dict[str, np.ndarray], sizes: list[int]
) -> None:
    """PNG: rank against the share of held-out text covered so far; colours are texts, line styles are
    rankings.
    """
    from fastmtp.show.plots import plt  # heavy, and not needed to count

    figure, axes = plt.subplots(figsize=(8, 5))
    styles = dict(zip(rankings, ["-", "--", "-.", ":"] * len(rankings), strict=False))
    for colour, (lang, tokens) in enumerate(held_out.items()):
        for name, ranking in rankings.items():
            if tokens.sum():
                covered = tokens[ranking].cumsum() / tokens.sum()
                label = f"{lang} text, {name} ranking ({100 * covered[-1]:.1f} % at its end)"
                axes.plot(
                    np.arange(1, len(covered) + 1), covered, styles[name], color=f"C{colour}", label=label
                )
    for size in sizes:
        axes.axvline(size, color="0.8", linewidth=0.8, zorder=0)
        axes.text(size, 0.01, size_name(size), rotation=90, fontsize=7, color="0.4", ha="right")
    axes.set(
        xscale="log",
        ylim=(0, 1.01),
        xlabel="rank of the token in the counted text",
        ylabel="share of held-out tokens",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with files.atomic(path) as temporary:
        # No version in the file's metadata: the same counts give the same bytes.
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
