"""The table of an ablation (benchmarks.ablation.run): accept length of each arm, its gain over the paper's
recipe, training facts.
"""

from __future__ import annotations

from pathlib import Path

from fastmtp import files
from fastmtp.inputs import read_json
from fastmtp.show.markdown import grid, number
from fastmtp.tau import Acceptance, ratio

REFERENCE = "self"  # FastMTP as published: the model's own answers, `paper` attention, labels from the text


def report(out: Path, names: list[str]) -> str:
    """Write table.md and table.json over the finished arms of `names`, in that order; returns the text."""
    results = [
        read_json(out / name / "result.json") for name in names if (out / name / "result.json").exists()
    ]
    table = {
        result["arm"]: {
            "about": result["about"],
            **{
                key: result[key] for key in ("steps", "epochs", "tokens", "seconds", "curve") if key in result
            },
            "at": {steps: at(result, steps, results) for steps in result["tau"]},
        }
        for result in results
    }
    text = markdown(table)
    for path in tables(out):
        files.claim(path)
    with files.atomic(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    files.write_json(out / "table.json", table)
    for path in tables(out):
        files.write_provenance(path, {"arms": list(table)})
    return text


def tables(out: Path) -> list[Path]:
    """The files that `report` writes."""
    return [out / "table.json", out / "table.md"]


def parts(result: dict, steps: str) -> dict[str, Acceptance]:
    """{source: counts} of one arm at one K, and "all"."""
    by_source = {}
    for source, row in result["tau"][steps].items():
        samples = [(tokens, passes) for tokens, passes in row["samples"]]
        by_source[source] = Acceptance(sum(tokens for tokens, _ in samples), row["histogram"], samples)
    total = Acceptance()
    for part in by_source.values():
        total.merge(part)
    return by_source | {"all": total}


def at(result: dict, steps: str, results: list[dict]) -> dict:
    """Figures of one arm at one K: tau, its interval, its rates, by source; and the gain over REFERENCE,
    paired by answer.
    """
    by_source = parts(result, steps)
    row = {
        "tau": {source: part.accept_length for source, part in by_source.items()},
        "interval": by_source["all"].interval,
        "position_rates": by_source["all"].position_rates,
    }
    for other in results:
        if other["arm"] == REFERENCE and other is not result:
            found = ratio(by_source["all"], parts(other, steps)["all"])
            if found is not None:
                row["gain"] = found[0] - 1
                row["gain_interval"] = [bound - 1 for bound in found[1:]]
    return row


def percent(row: dict) -> str:
    if "gain" not in row:
        return ""
    low, high = (f"{100 * bound:+.1f}" for bound in row["gain_interval"])
    return f"{100 * row['gain']:+.1f} % ({low} to {high})"


def markdown(table: dict) -> str:
    """Tables of tau at each K, of gains, of rates and tau by source (at the largest K and at 3), and of what
    training took.
    """
    if not table:
        return "No arm is finished."
    ks = list(next(iter(table.values()))["at"])
    parts = [
        "# Ablation",
        "tau: output tokens per verify pass, pooled over all answers; 95 % bootstrap intervals over answers.",
        *acceptance(table, ks),
    ]
    for k in (k for k in ks if k in ("3", ks[-1])):
        sources = list(next(iter(table.values()))["at"][k]["tau"])
        rows = [
            [name, *(number(arm["at"][k]["tau"][source], ".3f") for source in sources)]
            for name, arm in table.items()
        ]
        parts += [f"tau by task, K={k}:", grid(["arm", *sources], rows, 1)]
    trained = {name: arm for name, arm in table.items() if "steps" in arm}
    return "\n\n".join([*parts, *(training(trained) if trained else [])]) + "\n"


def acceptance(table: dict, ks: list[str]) -> list[str]:
    """tau of each arm at each K, its gain over the reference, and its rates by position at the largest K."""
    rows = []
    for name, arm in table.items():
        cells = [
            f"{row['tau']['all']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})"
            for row in arm["at"].values()
        ]
        rows.append([f"{name}: {arm['about']}", *cells])
    parts = [grid(["arm", *(f"tau at K={k}" for k in ks)], rows, 1)]
    if REFERENCE in table:
        rows = [
            [name, *(percent(row) for row in arm["at"].values())]
            for name, arm in table.items()
            if name != REFERENCE
        ]
        parts.append(f"Gain over `{REFERENCE}` on the same answers (paired intervals):")
        parts.append(grid(["arm", *(f"K={k}" for k in ks)], rows, 1))
    largest = ks[-1]
    rows = [
        [name, *(f"{rate:.3f}" for rate in arm["at"][largest]["position_rates"])]
        for name, arm in table.items()
    ]
    parts.append(f"Share of verify passes that accepted each draft, K={largest}:")
    parts.append(grid(["arm", *(f"draft {i}" for i in range(1, int(largest) + 1))], rows, 1))
    return parts


def training(trained: dict) -> list[str]:
    """What training took, and how tau on held-out samples grew."""
    total = sum(arm["tokens"] for arm in trained.values())
    rows = [
        [
            name,
            arm["steps"],
            f"{arm['epochs']:.1f}",
            f"{arm['tokens'] / 1e6:.1f}M",
            f"{arm['seconds']:.0f}",
            f"{arm['tokens'] / arm['seconds']:,.0f}",
        ]
        for name, arm in trained.items()
    ]
    curves = [
        f"- {name}: " + ", ".join(f"{row['step']}: {row['eval_tau']:.3f}" for row in arm["curve"])
        for name, arm in trained.items()
    ]
    return [
        f"Training, {total / 1e6:.1f}M tokens read in all (prompts included):",
        grid(["arm", "steps", "epochs", "tokens read", "seconds", "tokens per second"], rows, 1),
        "tau on held-out samples (the arm's own K) at each checkpoint:",
        "\n".join(curves),
    ]
