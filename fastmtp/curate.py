"""Distilled answers -> `train.jsonl` and `eval.jsonl` for `swift sft`, with exact token ids.

In order: cleaning, benchmark questions out, exact and near-duplicates out (the first of two stays, so put the
better source first), eval split off, the rest mixed to target token shares. Beside them: report.md,
counts.json, lengths.png. Token ids are checked with the tokenizer of `--model`, or of the model that the
distiller's record names.

    python -m fastmtp.curate --input distilled.jsonl --recipe configs/curate.yaml \\
        --data configs/data/local.yaml --exclude bench/math_500.jsonl --out data/mix
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmtp import hub
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.clean_set import Clean, CurateConfig, scan
from fastmtp.data.curate_report import Tally, write_report
from fastmtp.data.mixture import choose
from fastmtp.data.sources import DataConfig
from fastmtp.files import (
    atomic,
    check_apart,
    check_output,
    claim,
    disk_errors,
    read_record,
    record_of,
    write_provenance,
)
from fastmtp.formats.yaml_file import load_yaml
from fastmtp.inputs import existing, shipped

STAGING = ".curate.tmp"
OUTPUTS = ("train.jsonl", "eval.jsonl", "counts.json", "report.md", "lengths.png")


def split(kept: np.ndarray, close: np.ndarray, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions for (train, eval). Only samples without a near neighbour may be held out."""
    count = round(share * len(kept))
    lonely = [int(k) for k in kept if not close[k]]
    if len(lonely) < count:
        print(
            f"eval.jsonl holds {len(lonely)} samples, not {count}: the others have near neighbours",
            file=sys.stderr,
        )
    held = set(random.Random(f"{seed} eval").sample(lonely, min(count, len(lonely))))
    return [int(k) for k in kept if int(k) not in held], sorted(held)


def write_rows(path: Path, clean: Clean, positions: list[int], seed: int) -> None:
    """Write the rows in an order shuffled by `seed`.

    If one row says `loss`, all must: `datasets` fixes the keys of a message by the first 10 MB of the file.
    """
    order = list(positions)
    random.Random(f"{seed} order").shuffle(order)
    with atomic(path) as temporary, open(temporary, "wb") as out:
        for position in order:
            line = clean.row(position)
            if clean.given_turns:
                row = json.loads(line)
                for message in row["messages"]:
                    if message["role"] == "assistant":
                        message.setdefault("loss", True)
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            out.write(line)


@dataclass
class Parts:
    """Positions of the clean samples: to train on, held out, and all that the mix could choose from."""

    train: list[int]
    held: list[int]
    available: list[int]


def choose_parts(clean: Clean, config: CurateConfig, data: DataConfig | None, tally: Tally) -> Parts:
    """Near-duplicates out, eval split off, the rest mixed to the shares of `data`."""
    twin, similarity, close = clean.duplicates(config.dedup)
    for position in np.flatnonzero(twin >= 0).tolist():
        pair = clean.preview(position), clean.preview(twin[position])
        tally.drop(
            "near_duplicate", clean.sources[position], clean.tokens[position], *pair, similarity[position]
        )
    available, held = split(np.flatnonzero(twin < 0), close, config.eval_share, config.seed)
    if not (data and data.shares and available):
        return Parts(available, held, available)
    categories = clean.categories(data, config.data)
    picked = choose(
        [categories[k] for k in available],
        [clean.tokens[k] for k in available],
        data.shares,
        data.samples,
        config.seed,
    )
    return Parts([available[k] for k in picked], held, available)


def curate(paths: list[str], config: CurateConfig, model: str | None, out: Path, workers: int) -> dict:
    """The whole pipeline; returns the counts that it writes to counts.json."""
    data = load_yaml(config.data, DataConfig) if config.data else None
    if data:
        data.check(str(config.data))
    tally = Tally(config.seed)
    with tempfile.TemporaryFile(dir=out) as spool, staging(out) as new:
        clean = scan(paths, config, model, workers, spool, tally)
        categories = clean.categories(data, config.data)
        parts = choose_parts(clean, config, data, tally)
        if not parts.train:
            raise InputError(
                f"{paths[0]}: no sample is left to train on ({tally.summary() or 'the file is empty'})"
            )
        write_rows(new / "train.jsonl", clean, parts.train, config.seed)
        write_rows(new / "eval.jsonl", clean, parts.held, config.seed)
        facts = {
            name: [(categories[k], clean.sources[k], clean.tokens[k]) for k in positions]
            for name, positions in (
                ("train", parts.train),
                ("eval", parts.held),
                ("available", parts.available),
            )
        }
        return write_report(new, tally, facts, data.shares if data else {})


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A hidden folder in `out`, whose files move there together at the end: a kill leaves the old ones."""
    new = out / STAGING
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed; `out` is locked, so nobody writes it
    new.mkdir()
    try:
        yield new
        for path in new.iterdir():
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def model_of(paths: list[str]) -> str | None:
    """Model folder that the inputs' records name; None if none does, or if it is not there any more."""
    models = set()
    for path in paths:
        config = (read_record(record_of(path)) or {}).get("config")
        model = config.get("model") if isinstance(config, dict) else None
        if isinstance(model, str) and Path(model).is_dir():
            models.add(model)
    if len(models) > 1:
        raise InputError(f"{paths[0]}: the inputs are of {' and '.join(sorted(models))}; give one --model")
    return models.pop() if models else None


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.curate",
        "Clean, de-duplicate, split and mix distilled answers; write ms-swift's training files and a report.",
        "python -m fastmtp.curate --input distilled.jsonl --recipe configs/curate.yaml \\\n"
        "    --data configs/data/local.yaml --exclude bench/math_500.jsonl --out data/mix",
    )
    p.add_argument(
        "--input", nargs="+", required=True, help="distilled samples, .jsonl or .jsonl.gz; better ones first"
    )
    p.add_argument(
        "--recipe", type=shipped, help="YAML of thresholds (configs/curate.yaml); defaults without it"
    )
    p.add_argument(
        "--data", type=shipped, help="data set list with categories and token shares (configs/data/*.yaml)"
    )
    p.add_argument(
        "--model",
        help="the model that answered, a folder or ORG/NAME, to check ids (default: as recorded)",
    )
    p.add_argument("--exclude", nargs="+", help="question files of benchmarks: no such prompt is kept")
    p.add_argument("--out", required=True, help="folder for train.jsonl, eval.jsonl and the report")
    p.add_argument(
        "--eval-share", type=float, help="share of the clean samples held out for eval.jsonl (default 0)"
    )
    p.add_argument("--seed", type=int, help="of the split and the mix (default 0)")
    p.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    return p


def main(argv=None) -> None:
    args = parser().parse_args(argv)
    config = load_yaml(args.recipe, CurateConfig) if args.recipe else CurateConfig()
    options = {name: getattr(args, name) for name in ("data", "exclude", "eval_share", "seed")}
    config = dataclasses.replace(
        config, **{name: value for name, value in options.items() if value is not None}
    )
    if not 0 <= config.eval_share < 1:
        raise InputError(f"--eval-share must be at least 0 and below 1, not {config.eval_share}")
    at_least(args, 1, "workers")
    for path in args.input:
        if existing(path).is_dir():
            raise InputError(f"{path}: is a folder; give a .jsonl or .jsonl.gz file")
    model = str(hub.tokenizer(args.model)) if args.model else model_of(args.input)
    out = Path(args.out)
    claim(out, folder=True)
    for name in OUTPUTS:
        check_output(out / name)
        check_apart(out / name, *args.input, *config.exclude, args.recipe, config.data)
    with disk_errors(out):
        counts = curate(args.input, config, model, out, args.workers)
        inputs = [*args.input, *config.exclude, *filter(None, [args.recipe, config.data])]
        write_provenance(out, {**dataclasses.asdict(config), "model": model}, inputs)
    sizes = ", ".join(f"{counts[part]['samples']} {part}" for part in ("train", "eval"))
    print(f"{out}: {sizes}, dropped {counts['dropped']}")


if __name__ == "__main__":
    run(main)
