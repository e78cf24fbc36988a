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
import gzip
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.cleaning import CleanConfig
from fastmtp.data.curate_report import Tally, write_report
from fastmtp.data.dedup import PERMUTATIONS, DedupConfig, Questions, near_duplicates
from fastmtp.data.mixture import DataConfig, choose
from fastmtp.data.scan import FOREIGN, Rules, Scanned, Spelling, scan_line
from fastmtp.files import atomic, check_output, claim, disk_errors, read_record, record_of, write_provenance
from fastmtp.inputs import existing, shipped
from fastmtp.yaml_file import load_yaml

CHUNK = 128  # samples that travel to a worker together
MOST_FOREIGN = 0.1  # share of samples with ids of another tokenizer beyond which the whole input is doubted
STAGING = ".curate.tmp"
OUTPUTS = ("train.jsonl", "eval.jsonl", "counts.json", "report.md", "lengths.png")


@dataclass
class CurateConfig:
    """A whole recipe; options on the command line win over it."""

    eval_share: float = 0.0  # of the clean samples, held out for eval.jsonl before mixing
    seed: int = 0
    data: str | None = (
        None  # data set list with categories and shares (configs/data/*.yaml); null takes everything
    )
    exclude: list[str] = field(default_factory=list)  # question files of the benchmarks
    clean: CleanConfig = field(default_factory=CleanConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)


_rules: Rules


def _start(rules: Rules) -> None:
    global _rules
    _rules = rules


def _scan_chunk(chunk: list[tuple[str, bytes]]) -> list[Scanned]:
    return [scan_line(line, place, _rules) for place, line in chunk]


def chunks(paths: list[str]) -> Iterator[list[tuple[str, bytes]]]:
    """Non-empty lines of the files in order, as ("file:line", bytes), CHUNK at a time."""

    def lines() -> Iterator[tuple[str, bytes]]:
        for path in paths:
            try:
                with (gzip.open if path.endswith(".gz") else open)(existing(path), "rb") as stream:
                    yield from ((f"{path}:{n}", line) for n, line in enumerate(stream, 1) if line.strip())
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise InputError(f"{path}: broken gzip file ({error}); fetch or pack it again") from None

    feed = lines()
    while chunk := list(itertools.islice(feed, CHUNK)):
        yield chunk


class Clean:
    """The clean samples: small facts in memory, rows and previews in a temporary file, signatures and keys in
    buffers.
    """

    def __init__(self, spool: BinaryIO):
        self.spool = spool
        self.offsets: list[int] = []
        self.tokens: list[int] = []
        self.sources: list[str] = []
        self.signatures = bytearray(), bytearray()
        self.keys = bytearray(), bytearray()
        self.given_turns = False

    def add(self, item: Scanned) -> None:
        self.offsets.append(self.spool.tell())
        self.tokens.append(item.tokens)
        self.sources.append(item.source)
        self.signatures[0].extend(item.sample_signature)
        self.signatures[1].extend(item.prompt_signature)
        self.keys[0].extend(item.letters_key[:8])
        self.keys[1].extend(item.prompt_key[:8])
        # A quote inside a text is written \", so this is the key.
        self.given_turns |= b'"loss": false' in item.row
        self.spool.write(item.row + b"\n" + item.preview.encode() + b"\n")

    def row(self, position: int) -> bytes:
        self.spool.seek(self.offsets[position])
        return self.spool.readline()

    def preview(self, position: int) -> str:
        self.row(position)
        return self.spool.readline().decode()

    def categories(self, data: DataConfig | None, listed_in: str | None) -> list[str]:
        """Category of each sample. Raises InputError for a source that `data` does not list."""
        if not data:
            return [source or "all" for source in self.sources]
        known = {source.name: source.category for source in data.sources}
        for source in dict.fromkeys(self.sources):
            if source not in known:
                raise InputError(
                    f"{listed_in}: no source '{source}', which the samples name; add it to 'sources'"
                )
        return [known[source] for source in self.sources]

    def duplicates(self, config: DedupConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`near_duplicates` of these samples."""
        samples, prompts = (
            np.frombuffer(buffer, dtype=np.uint32).reshape(-1, PERMUTATIONS) for buffer in self.signatures
        )
        letters, keys = (np.frombuffer(buffer, dtype=np.uint64) for buffer in self.keys)
        return near_duplicates(samples, prompts, config, letters, keys)


def scan(
    paths: list[str], config: CurateConfig, model: str | None, workers: int, spool: BinaryIO, tally: Tally
) -> Clean:
    """Read all inputs; clean samples without exact duplicates. What is dropped goes into `tally`.

    Raises InputError if more than MOST_FOREIGN of the samples have ids of another tokenizer.
    """
    questions = Questions(config.exclude, config.dedup.question_overlap)
    rules = Rules(config.clean, questions, Spelling(model) if model else None)
    clean, seen, seen_prompts = Clean(spool), set(), set()
    first_foreign, read = None, 0
    _start(rules)
    pool = multiprocessing.Pool(workers, _start, (rules,)) if workers > 1 else None
    try:
        results = pool.imap(_scan_chunk, chunks(paths)) if pool else map(_scan_chunk, chunks(paths))
        with tqdm(desc="curate", unit="sample", disable=None) as bar:
            for item in itertools.chain.from_iterable(results):
                read += 1
                bar.update()
                reason = item.reason
                if reason is None and item.key in seen:
                    reason = "exact_duplicate"
                elif reason is None and item.prompt_key in seen_prompts:
                    reason = "same_prompt" if config.dedup.prompt_threshold is not None else None
                if reason:
                    tally.drop(reason, item.source, item.tokens, item.preview)
                    if reason in FOREIGN:
                        first_foreign = first_foreign or f"{json.loads(item.preview)[0]}: {FOREIGN[reason]}"
                    continue
                seen.add(item.key)
                seen_prompts.add(item.prompt_key)
                clean.add(item)
    finally:
        if pool:
            pool.terminate()
    foreign = sum(tally.counts[reason] for reason in FOREIGN)
    if foreign > MOST_FOREIGN * read:
        raise InputError(
            f"{first_foreign}, and so {foreign} of {read} samples; give the --model that they are of"
        )
    if foreign:
        print(f"left out {foreign} of {read} samples, the first: {first_foreign}", file=sys.stderr)
    return clean


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
        help="the model that answered, to check ids (default: as the distiller recorded)",
    )
    p.add_argument("--exclude", nargs="+", help="question files of benchmarks: no such prompt is kept")
    p.add_argument("--out", required=True, help="folder for train.jsonl, eval.jsonl and the report")
    p.add_argument(
        "--eval-share", type=float, help="share of the clean samples held out for eval.jsonl (default 0)"
    )
    p.add_argument("--seed", type=int, help="of the split and the mix (default 0)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
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
        existing(path)
    model = args.model or model_of(args.input)
    out = Path(args.out)
    claim(out, folder=True)
    for name in OUTPUTS:
        check_output(out / name)
    with disk_errors(out):
        counts = curate(args.input, config, model, out, args.workers)
        inputs = [*args.input, *config.exclude, *filter(None, [args.recipe, config.data])]
        write_provenance(out, {**dataclasses.asdict(config), "model": model}, inputs)
    sizes = ", ".join(f"{counts[part]['samples']} {part}" for part in ("train", "eval"))
    print(f"{out}: {sizes}, dropped {counts['dropped']}")


if __name__ == "__main__":
    run(main)
