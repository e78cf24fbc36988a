"""The table of a speed run: each point against plain decoding, and against the bound of the memory."""

from __future__ import annotations

from fastmtp.planning.costs import CostTable, Drafts, Setting
from fastmtp.show.markdown import grid, number


def with_speedups(rows: list[dict]) -> list[dict]:
    """Each row against the plain decoding of its variant, or of that variant's base; None if that was not
    measured.
    """
    plain = {
        (row["variant"], row["streams"]): row["tokens_per_s"]
        for row in rows
        if row["num_steps"] == 0 and not row["repeat"]
    }
    dropped = ("fingerprint", "point", "command", "profile")
    points = []
    for row in rows:
        base = plain.get((row["base"], row["streams"]))
        speedup = row["tokens_per_s"] / base if base else None
        points.append({k: v for k, v in row.items() if k not in dropped} | {"speedup": speedup})
    return points


def costs(rows: list[dict], shape: dict, facts: dict) -> CostTable:
    """What fastmtp.plan reads. Left out: repeats, and servers that change the number of steps."""
    table = CostTable(shape, facts["gpu"], facts["sglang"])
    for row in rows:
        if not row["repeat"] and not row["adaptive"]:
            tree = row["tree"] or {"topk": 1, "nodes": row["num_steps"] + 1}
            drafts = Drafts(row["num_steps"], tree["topk"], tree["nodes"], row["head_rows"])
            setting = Setting(tuple(row["variant_flags"]), tuple(sorted(row["variant_environment"].items())))
            table.add(setting, drafts, row["streams"], row["ms_per_cycle"])
    return table


def markdown(report: dict) -> str:
    head = [
        "point",
        "accept length",
        "tok/s",
        "speed-up",
        "ms per cycle",
        "GB per cycle",
        "share of the bound",
    ]
    rows = []
    for row in report["points"]:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.1f}"
        rows.append(
            [
                row["name"],
                f"{row['tau']:.2f}",
                f"{row['tokens_per_s']:.1f}{spread}",
                number(row["speedup"] or None, ".2f") + ("x" if row["speedup"] else ""),
                f"{row['ms_per_cycle']:.3f}",
                f"{row['bytes_per_cycle'] / 1e9:.2f}",
                f"{row['bound_share']:.0%}",
            ]
        )
    text = f"""# Speed at the shape of {report["shape"]}, dummy weights

{report["gpu"]}, SGLang {report["sglang"]}, accept lengths simulated from {report["rates"]}. \
Prefill is left out. The bound is the bytes of one cycle over a measured copy bandwidth of \
{report["points"][0]["copy_bandwidth"] / 1e12:.2f} TB/s.

{grid(head, rows)}
"""
    if any(row["tree"] for row in report["points"]):
        text += (
            "\nA tree's accept length is that of the chain of its depth times its --tree-gain (default 1); "
            "its time per cycle is measured.\n"
        )
    if report["assumed"]:
        names = ", ".join(report["assumed"])
        text += (
            f"\nThe acceptance of {names} was not measured here: one accept length is assumed, so only "
            "the cost differs.\n"
        )
    return text
