"""What the measured cycles mean at the accept lengths of real text, and the tables of `cost.py`."""

from __future__ import annotations

from benchmarks.dynamic_vocabulary.kernels import LANGS
from fastmtp.cli import InputError
from fastmtp.inputs import read_json
from fastmtp.show.markdown import grid
from fastmtp.vocab.draft_vocab import AUTO, MIXED, UNION
from fastmtp.vocab.token_map import size_name

COLUMNS = ("switch_us", "head_us", "static_us")


def speeds(rows: dict[str, dict], taus: dict[str, dict], size: int, union: int) -> list[dict]:
    """tau of each choice and language from fastmtp.acceptance, over the measured cycle of its arm."""
    size_text = size_name(size)
    cycles = {
        "full": "full",
        AUTO: f"auto {size_text}",
        UNION: f"stock {size_name(union)}",
        MIXED: f"stock {size_text}",
    }
    rows_of_speed = []
    for lang in LANGS:
        other = LANGS[1 - LANGS.index(lang)]
        choices = {
            "fixed, right": lang,
            "fixed, wrong": other,
            "following": AUTO,
            "mix of this size": MIXED,
            "union": UNION,
            "whole head": "full",
        }
        for choice, name in choices.items():
            ms = rows[cycles.get(name, f"stock {size_text}")]["ms_per_cycle"]
            tau = taus[lang][name]
            rows_of_speed.append(
                {
                    "size": size,
                    "lang": lang,
                    "choice": choice,
                    "tau": tau,
                    "ms": ms,
                    "tokens_per_s": 1000 * tau / ms,
                }
            )
    return rows_of_speed


def read_taus(path: str) -> dict[str, dict[str, float]]:
    """{language: {map name: tau}} of a fastmtp.acceptance --out file, sources pooled."""
    counts: dict[str, dict[str, list[int]]] = {}
    for row in read_json(path)["rows"]:
        pair = counts.setdefault(row["lang"], {}).setdefault(row["map"], [0, 0])
        pair[0] += row["output_tokens"]
        pair[1] += row["verify_passes"]
    for lang in LANGS:
        missing = {*LANGS, MIXED, UNION, AUTO, "full"} - counts.get(lang, {}).keys()
        if missing:
            raise InputError(
                f"{path}: no rows for '{lang}' with {', '.join(sorted(missing))}; run acceptance with "
                f"--token-maps"
            )
    return {lang: {name: t / p for name, (t, p) in maps.items()} for lang, maps in counts.items()}


def markdown(report: dict) -> str:
    kernels = [[r["rows"], *(f"{r[c]:.1f}" for c in COLUMNS)] for r in report["kernels"]]
    parts = [
        "# A draft vocabulary that follows the language, at 7B shape",
        f"{report['gpu']}, dummy weights, bfloat16, one stream.",
        grid(["rows of the head", "switch, us", "following head, us", "static head, us"], kernels, 0),
    ]
    if report["arms"]:
        tau = report["arms"][0]["tau"]
        head = ["server", "ms per cycle", f"tokens/s at tau {tau:.2f}", "spread", "switches"]
        rows = [
            [
                r["name"],
                f"{r['ms_per_cycle']:.3f}",
                f"{r['tokens_per_s']:.1f}",
                f"{r['spread']:.1f}",
                r.get("switches", ""),
            ]
            for r in report["arms"]
        ]
        parts.append(grid(head, rows, 1))
    if report["speeds"]:
        head = ["map size", "language", "draft vocabulary", "tau", "ms per cycle", "tokens/s"]
        rows = [
            [
                size_name(r["size"]),
                r["lang"],
                r["choice"],
                f"{r['tau']:.3f}",
                f"{r['ms']:.3f}",
                f"{r['tokens_per_s']:.1f}",
            ]
            for r in report["speeds"]
        ]
        parts.append(grid(head, rows, 3))
    return "\n\n".join(parts) + "\n"
