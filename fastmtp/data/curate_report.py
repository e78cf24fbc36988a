"""What curation did, for people: report.md with counts, shares and examples, counts.json, and lengths.png."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter, defaultdict
from pathlib import Path

from fastmtp.data.cleaning import REASONS
from fastmtp.data.scan import FOREIGN
from fastmtp.files import atomic, write_json

ALL_REASONS = (
    REASONS
    | FOREIGN
    | {
        "benchmark": "its prompt contains a question of an excluded benchmark",
        "exact_duplicate": "the same words, numbers and operators as an earlier sample",
        "same_prompt": "the same prompt as an earlier sample, answered differently",
        "near_duplicate": "nearly the same words as an earlier sample, or nearly the same prompt",
    }
)
EXAMPLES = 5


class Tally:
    """Counts what was dropped and keeps a fair handful of examples of each reason (reservoir sampling by
    `seed`).
    """

    def __init__(self, seed: int):
        self.random = random.Random(f"{seed} examples")
        self.counts: Counter[str] = Counter()
        self.by_source: Counter[tuple[str, str]] = Counter()
        self.tokens: list[int] = []
        self.examples: dict[str, list[tuple[str, str | None, float]]] = defaultdict(list)

    def drop(
        self,
        reason: str,
        source: str,
        tokens: int,
        preview: str,
        twin: str | None = None,
        similarity: float = 0.0,
    ) -> None:
        """Count one dropped sample; `twin` is the preview of the sample that it repeats, if any."""
        self.counts[reason] += 1
        self.by_source[source, reason] += 1
        self.tokens.append(tokens)
        shown = self.examples[reason]
        if len(shown) < EXAMPLES:
            shown.append((preview, twin, similarity))
        elif (slot := self.random.randrange(self.counts[reason])) < EXAMPLES:
            shown[slot] = (preview, twin, similarity)

    def summary(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.counts.most_common())


def write_report(
    out: Path, tally: Tally, facts: dict[str, list[tuple[str, str, int]]], shares: dict[str, float]
) -> dict:
    """Write the three files into `out`. `facts` maps train, eval and available (clean, before mixing, without
    eval) to (category, source, answer tokens) a sample; `shares` are the targets, empty without a mix.
    Returns the counts.
    """
    counts = _counts(tally, facts, shares)
    write_json(out / "counts.json", counts)
    _lengths(out / "lengths.png", tally, facts["train"])
    with atomic(out / "report.md") as temporary:
        temporary.write_text(_markdown(counts, tally), encoding="utf-8")
    return counts


def _counts(tally: Tally, facts: dict[str, list[tuple[str, str, int]]], shares: dict[str, float]) -> dict:
    total = {
        name: {"samples": len(rows), "tokens": sum(row[2] for row in rows)} for name, rows in facts.items()
    }
    categories = {}
    for category in sorted({row[0] for row in facts["available"]} | set(shares)):
        train, have = (
            [row[2] for row in facts[name] if row[0] == category] for name in ("train", "available")
        )
        categories[category] = {
            "target_share": shares.get(category),
            "reached_share": sum(train) / max(total["train"]["tokens"], 1),
            "samples": len(train),
            "tokens": sum(train),
            "available_samples": len(have),
            "available_tokens": sum(have),
        }
    sources = {}
    for source in sorted({row[1] for row in facts["available"]} | {source for source, _ in tally.by_source}):
        sources[source] = {
            "train": sum(row[1] == source for row in facts["train"]),
            "eval": sum(row[1] == source for row in facts["eval"]),
            "dropped": {reason: n for (name, reason), n in sorted(tally.by_source.items()) if name == source},
        }
    dropped = dict(sorted(tally.counts.items(), key=lambda pair: -pair[1]))
    return {
        "read": total["available"]["samples"] + total["eval"]["samples"] + sum(dropped.values()),
        "dropped": dropped,
        "left_over_by_the_mix": total["available"]["samples"] - total["train"]["samples"],
        "train": total["train"],
        "eval": total["eval"],
        "categories": categories,
        "sources": sources,
    }


def _markdown(counts: dict, tally: Tally) -> str:
    train, held, read = counts["train"], counts["eval"], counts["read"]
    lines = [
        "# Curation report",
        "",
        f"{read:,} samples read; "
        f"{train['samples']:,} in train.jsonl ({train['tokens']:,} answer tokens), "
        f"{held['samples']:,} in eval.jsonl ({held['tokens']:,}), "
        f"{sum(counts['dropped'].values()):,} dropped, "
        f"{counts['left_over_by_the_mix']:,} clean ones left over by the mix.",
        "",
        "## Dropped",
        "",
        "| reason | samples | of all read | what it means |",
        "|---|---:|---:|---|",
    ]
    for reason, count in counts["dropped"].items():
        lines.append(f"| {reason} | {count:,} | {count / max(read, 1):.2%} | {ALL_REASONS[reason]} |")
    lines += [
        "",
        "## Mix (shares of answer tokens)",
        "",
        "| category | target | reached | samples | tokens | clean samples | clean tokens |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, c in counts["categories"].items():
        target = "" if c["target_share"] is None else f"{c['target_share']:.1%}"
        lines.append(
            f"| {name} | {target} | {c['reached_share']:.1%} | {c['samples']:,} | {c['tokens']:,} "
            f"| {c['available_samples']:,} | {c['available_tokens']:,} |"
        )
    lines += ["", "## Sources", "", "| source | train | eval | dropped |", "|---|---:|---:|---|"]
    for name, s in counts["sources"].items():
        why = ", ".join(f"{reason} {n:,}" for reason, n in s["dropped"].items())
        lines.append(f"| {name or '(none)'} | {s['train']:,} | {s['eval']:,} | {why} |")
    lines += ["", "![Answer lengths](lengths.png)", "", "## Examples of what was dropped"]
    for reason in counts["dropped"]:
        lines += ["", f"### {reason}", ""]
        for preview, twin, similarity in tally.examples[reason]:
            lines.append(f"- {_shown(preview)}")
            if twin:
                lines.append(f"  - similarity {similarity:.2f} to {_shown(twin)}")
    return "\n".join(lines) + "\n"


def _shown(preview: str) -> str:
    where, prompt, head, tail = json.loads(preview)
    answer = f"{head} [...] {tail}" if tail else head
    return f"{where}: {_code(prompt)} -> {_code(answer)}"


def _code(text: str) -> str:
    """Text as inline code on one line, whatever is in it."""
    flat = " ".join(text.split()).replace("`", "'")
    return f"`{flat}`" if flat else "(nothing)"


def _lengths(path: Path, tally: Tally, train: list[tuple[str, str, int]]) -> None:
    """Histogram of answer lengths: the training set by category, and what was dropped."""
    from fastmtp.show.plots import plt, save  # matplotlib is heavy

    groups = {name: [row[2] for row in train if row[0] == name] for name in sorted({row[0] for row in train})}
    longest = max([row[2] for row in train] + tally.tokens + [2])
    # Edges 1, 2, 3, 4, 6, 8, 11, 16, ...: whole tokens, or short answers leave gaps and spikes.
    bins = sorted({round(2 ** (k / 2)) - 0.5 for k in range(2 * longest.bit_length() + 1)})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    # A dollar in a name of somebody's data set is no formula.
    labels = [f"{name} ({len(sizes):,})".replace("$", r"\$") for name, sizes in groups.items()]
    axes.hist(list(groups.values()), bins, stacked=True, label=labels)
    if tally.tokens:
        axes.hist(
            tally.tokens,
            bins,
            histtype="step",
            color="black",
            linewidth=1.2,
            label=f"dropped ({len(tally.tokens):,})",
        )
    axes.set(
        xscale="log",
        xlabel="answer tokens per sample",
        ylabel="samples",
        title="Answer lengths in train.jsonl",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(fontsize="small")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        save(figure, path)
