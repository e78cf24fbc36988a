"""The table of an ablation (benchmarks.ablation.run): accept length of each arm, its gain over the paper's
recipe, training facts.
"""

from __future__ import annotations

from pathlib import Path

from fastmtp import files
from fastmtp.inputs import read_json
from fastmtp.markdown import number
from fastmtp.tau import Acceptance, bootstrap, bounds

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
    found = {}
    for source, row in result["tau"][steps].items():
        samples = [(tokens, passes) for tokens, passes in row["samples"]]
        found[source] = Acceptance(sum(tokens for tokens, _ in samples), row["histogram"], samples)
    total = Acceptance()
    for part in found.values():
        total.merge(part)
    return found | {"all": total}


def at(result: dict, steps: str, results: list[dict]) -> dict:
    """Figures of one arm at one K: tau, its interval, its rates, by source; and the gain over REFERENCE,
    paired by answer.
    """
    found = parts(result, steps)
    row = {
        "tau": {source: part.accept_length for source, part in found.items()},
        "interval": found["all"].interval,
        "position_rates": found["all"].position_rates,
    }
    for other in results:
        if other["arm"] == REFERENCE and other is not result:
            reference = parts(other, steps)["all"]
            if row["interval"] is None or reference.interval is None:  # nothing was verified
                continue
            ratio = bootstrap(found["all"].samples) / bootstrap(reference.samples)
            row["gain"] = found["all"].accept_length / reference.accept_length - 1
            row["gain_interval"] = [bound - 1 for bound in bounds(ratio)]
    return row


def grid(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(row: dict) -> str:
    if "gain" not in row:
        return ""
    low, high = (f"{100 * bound:+.1f}" for bound in row["gain_interval"])
    return f"{100 * row['gain']:+.1f} % ({low} to {high})"


def markdown(table: dict) -> str:
    """Four tables: tau at each K, gains, rates and tau by source at the largest K and at 3, and what training
    took.
    """
    if not table:
        return "No arm is finished."
    ks = list(next(iter(table.values()))["at"])
    sources = list(next(iter(table.values()))["at"][ks[0]]["tau"])
    lines = [
        "# Ablation",
        "",
        "tau: output tokens per verify pass, pooled over all answers; 95 % bootstrap intervals over answers.",
        "",
    ]
    rows = []
    for name, arm in table.items():
        cells = [
            f"{row['tau']['all']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})"
            for row in arm["at"].values()
        ]
        rows.append([f"{name}: {arm['about']}", *cells])
    lines += [grid(["arm", *(f"tau at K={k}" for k in ks)], rows), ""]
    if REFERENCE in table:
        lines += [f"Gain over `{REFERENCE}` on the same answers (paired intervals):", ""]
        rows = [
            [name, *(percent(row) for row in arm["at"].values())]
            for name, arm in table.items()
            if name != REFERENCE
        ]
        lines += [grid(["arm", *(f"K={k}" for k in ks)], rows), ""]
    largest = ks[-1]
    lines += [f"Share of verify passes that accepted each draft, K={largest}:", ""]
    rows = [
        [name, *(f"{rate:.3f}" for rate in arm["at"][largest]["position_rates"])]
        for name, arm in table.items()
    ]
    lines += [grid(["arm", *(f"draft {i}" for i in range(1, int(largest) + 1))], rows), ""]
    for k in (k for k in ks if k in ("3", largest)):
        lines += [f"tau by task, K={k}:", ""]
        rows = [
            [name, *(number(arm["at"][k]["tau"][source], ".3f") for source in sources)]
            for name, arm in table.items()
        ]
        lines += [grid(["arm", *sources], rows), ""]
    trained = {name: arm for name, arm in table.items() if "steps" in arm}
    if trained:
        total = sum(arm["tokens"] for arm in trained.values())
        lines += [f"Training, {total / 1e6:.1f}M tokens read in all (prompts included):", ""]
        rows = [
            [
                name,
                str(a["steps"]),
                f"{a['epochs']:.1f}",
                f"{a['tokens'] / 1e6:.1f}M",
                f"{a['seconds']:.0f}",
                f"{a['tokens'] / a['seconds']:,.0f}",
            ]
            for name, a in trained.items()
        ]
        lines += [grid(["arm", "steps", "epochs", "tokens read", "seconds", "tokens a second"], rows), ""]
        lines += ["tau on held-out samples (the arm's own K) at each checkpoint:", ""]
        lines += [
            f"- {name}: " + ", ".join(f"{row['step']}: {row['eval_tau']:.3f}" for row in a["curve"])
            for name, a in trained.items()
        ]
        lines.append("")
    return "\n".join(lines)
