"""Distilled answers -> `train.jsonl` and `eval.jsonl` that `swift sft` loads as they are, exact token ids
kept.

In order: cleaning, benchmark questions out, exact and near-duplicates out (the first of two stays, so put the
better source first), eval split off, the rest mixed to target token shares. Beside them: report.md,
counts.json, lengths.png.

    python -m fastmtp.curate --input distilled.jsonl --recipe configs/curate.yaml --data configs/data/local.yaml \\
        --exclude bench/math_500.jsonl bench/mt_bench.jsonl --out data/mix
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.cleaning import CleanConfig, verdict, words
from fastmtp.data.curate_report import Tally, write_report
from fastmtp.data.dedup import PERMUTATIONS, DedupConfig, Questions, near_duplicates, signature
from fastmtp.data.mixture import DataConfig, choose
from fastmtp.files import atomic, existing, shipped, write_provenance
from fastmtp.yaml_file import load_yaml

CHUNK = 128  # samples that travel to a worker together


@dataclass
class CurateConfig:
    """A whole recipe; options on the command line go before it."""

    eval_share: float = 0.0  # of the clean samples, held out for eval.jsonl before mixing
    seed: int = 0
    data: str | None = (
        None  # data set list with categories and shares (configs/data/*.yaml); null takes everything
    )
    exclude: list[str] = field(default_factory=list)  # question files of the benchmarks
    clean: CleanConfig = field(default_factory=CleanConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)


class Scanned(NamedTuple):
    """What one input line comes to. `reason` is None for a clean sample, and only then are the last five
    filled in.
    """

    reason: str | None
    source: str
    tokens: int  # of its answers
    preview: str
    row: bytes = b""  # the training row, JSON
    key: bytes = b""  # of its words, prompt and answers
    prompt_key: bytes = b""
    sample_signature: bytes = b""
    prompt_signature: bytes = b""


def training_row(sample: dict, where: str) -> tuple[list[dict], list[str], int]:
    """A distilled sample -> (messages in ms-swift's form, texts of the model's answers, their token count).

    An answer of the model is `{"token_ids": [...]}`, never text to tokenise again. An assistant turn without
    ids was given with the prompt; it stays text and gets `"loss": false`, as no one is to learn it. Every row
    holds ids, which also keeps the `datasets` JSON reader from taking `content` for a plain string column.
    Raises InputError, starting with `where`, for a sample that breaks the contract.
    """
    messages = sample.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages) or len(messages) < 2:
        raise InputError(
            f"{where}: 'messages' must be a list of a prompt and its answer; mend or remove this line"
        )
    if messages[-1].get("role") != "assistant":
        raise InputError(
            f"{where}: the last message is no answer; write this file with `python -m fastmtp.distill`"
        )
    row, answers, tokens = [], [], 0
    for turn, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise InputError(
                f"{where}: message {turn} needs a 'role' and a text as 'content'; mend or remove this line"
            )
        ids = message.get("token_ids") if role == "assistant" else None
        if ids is None and turn == len(messages) - 1:
            ids = sample.get("output_ids")
            if not isinstance(ids, list):
                raise InputError(
                    f"{where}: the answer has no 'token_ids'; write it with `python -m fastmtp.distill`"
                )
        if ids is not None:
            answers.append(content)
            tokens += len(ids)
            row.append({"role": role, "content": {"token_ids": ids}})
        else:
            row.append({"role": role, "content": content} | ({"loss": False} if role == "assistant" else {}))
    return row, answers, tokens


def _digest(text: str) -> bytes:
    """Key under which texts that differ only in case, spacing or punctuation fall together."""
    return hashlib.blake2b(" ".join(words(text) or [text.strip()]).encode(), digest_size=16).digest()


def scan_line(line: bytes, where: str, config: CurateConfig, questions: Questions) -> Scanned:
    """Judge one sample by itself and make its signatures."""
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); mend or remove this line") from None
    if not isinstance(sample, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(sample).__name__}; mend this line")
    row, answers, tokens = training_row(sample, where)
    source = str(sample.get("source") or "")
    prompt = "\n".join(m["content"] for m in sample["messages"] if m["role"] == "user")
    whole = "\n".join(m["content"] for m in sample["messages"] if m["role"] != "system")
    total = max(tokens, len(sample.get("prompt_ids") or []) + len(sample.get("output_ids") or []))
    preview = json.dumps(
        [where, prompt[:300], answers[-1][:300], answers[-1][300:][-150:]], ensure_ascii=False
    )
    reason = verdict(answers, sample.get("finish", ""), sample.get("lang", ""), tokens, total, config.clean)
    if reason is None and questions.find(prompt):
        reason = "benchmark"
    if reason:
        return Scanned(reason, source, tokens, preview)
    return Scanned(
        None,
        source,
        tokens,
        preview,
        json.dumps({"messages": row}, ensure_ascii=False).encode(),
        _digest(whole),
        _digest(prompt),
        signature(whole).tobytes(),
        signature(prompt).tobytes(),
    )


_worker: tuple[CurateConfig, Questions]


def _start(config: CurateConfig, questions: Questions) -> None:
    global _worker
    _worker = (config, questions)


def _scan_chunk(chunk: list[tuple[str, bytes]]) -> list[Scanned]:
    return [scan_line(line, where, *_worker) for where, line in chunk]


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
    while chunk := list(islice(feed, CHUNK)):
        yield chunk


class Clean:
    """The clean samples: small facts in memory, rows and previews in a temporary file, signatures in two
    buffers.
    """

    def __init__(self, spool: BinaryIO):
        self.spool = spool
        self.offsets: list[int] = []
        self.tokens: list[int] = []
        self.sources: list[str] = []
        self.signatures = bytearray(), bytearray()
        self.given_turns = False

    def add(self, item: Scanned) -> None:
        self.offsets.append(self.spool.tell())
        self.tokens.append(item.tokens)
        self.sources.append(item.source)
        self.signatures[0].extend(item.sample_signature)
        self.signatures[1].extend(item.prompt_signature)
        self.given_turns |= (
            b'"loss": false' in item.row
        )  # a quote inside a text is written \", so this is the key
        self.spool.write(item.row + b"\n" + item.preview.encode() + b"\n")

    def row(self, position: int) -> bytes:
        self.spool.seek(self.offsets[position])
        return self.spool.readline()

    def preview(self, position: int) -> str:
        self.row(position)
        return self.spool.readline().decode()

    def matrix(self, which: int) -> np.ndarray:
        """Signatures, (N, PERMUTATIONS) uint32: 0 of whole samples, 1 of prompts."""
        return np.frombuffer(self.signatures[which], dtype=np.uint32).reshape(-1, PERMUTATIONS)


def scan(paths: list[str], config: CurateConfig, workers: int, spool: BinaryIO, tally: Tally) -> Clean:
    """Read all inputs; clean samples without exact duplicates. What is dropped goes into `tally`."""
    questions = Questions(config.exclude, config.dedup.question_overlap)
    clean, seen, seen_prompts = Clean(spool), set(), set()
    _start(config, questions)
    pool = multiprocessing.Pool(workers, _start, (config, questions)) if workers > 1 else None
    try:
        results = pool.imap(_scan_chunk, chunks(paths)) if pool else map(_scan_chunk, chunks(paths))
        with tqdm(desc="curate", unit="sample", disable=None) as bar:
            for chunk in results:
                for item in chunk:
                    reason = item.reason
                    if reason is None and item.key in seen:
                        reason = "exact_duplicate"
                    elif (
                        reason is None
                        and config.dedup.prompt_threshold is not None
                        and item.prompt_key in seen_prompts
                    ):
                        reason = "same_prompt"
                    if reason:
                        tally.drop(reason, item.source, item.tokens, item.preview)
                        continue
                    seen.add(item.key)
                    seen_prompts.add(item.prompt_key)
                    clean.add(item)
                bar.update(len(chunk))
    finally:
        if pool:
            pool.terminate()
    return clean


def split(kept: np.ndarray, close: np.ndarray, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions for (train, eval). Only samples without a near neighbour may be held out."""
    wanted = round(share * len(kept))
    lonely = [int(k) for k in kept if not close[k]]
    if len(lonely) < wanted:
        print(
            f"eval.jsonl holds {len(lonely)} samples, not {wanted}: the others have near neighbours",
            file=sys.stderr,
        )
    held = set(random.Random(f"{seed} eval").sample(lonely, min(wanted, len(lonely))))
    return [int(k) for k in kept if int(k) not in held], sorted(held)


def write_rows(path: Path, clean: Clean, positions: list[int], seed: int) -> None:
    """Write the rows in an order shuffled by `seed`.

    Where one row says `loss`, all have to: `datasets` fixes the keys of a message by the first 10 MB of the
    file.
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


def curate(paths: list[str], config: CurateConfig, out: Path, workers: int) -> dict:
    """The whole pipeline; returns the counts that it writes to counts.json."""
    data = load_yaml(config.data, DataConfig) if config.data else None
    if data:
        data.check(str(config.data))
    out.mkdir(parents=True, exist_ok=True)
    tally = Tally(config.seed)
    with tempfile.TemporaryFile(dir=out) as spool:
        clean = scan(paths, config, workers, spool, tally)
        category = {source.name: source.category for source in data.sources} if data else {}
        for source in Counter(clean.sources):
            if data and source not in category:
                raise InputError(
                    f"{config.data}: no source '{source}', which the samples name; add it to 'sources'"
                )
        twin, similarity, close = near_duplicates(clean.matrix(0), clean.matrix(1), config.dedup)
        for position in np.flatnonzero(twin >= 0).tolist():
            pair = clean.preview(position), clean.preview(twin[position])
            tally.drop(
                "near_duplicate", clean.sources[position], clean.tokens[position], *pair, similarity[position]
            )
        train, held = split(np.flatnonzero(twin < 0), close, config.eval_share, config.seed)
        categories = [category.get(source, source or "all") for source in clean.sources]
        available = list(train)
        if data and data.shares and train:
            picked = choose(
                [categories[k] for k in train],
                [clean.tokens[k] for k in train],
                data.shares,
                data.samples,
                config.seed,
            )
            train = [train[k] for k in picked]
        if not train:
            raise InputError(
                f"{paths[0]}: no sample is left to train on ({tally.summary() or 'the file is empty'})"
            )
        write_rows(out / "train.jsonl", clean, train, config.seed)
        write_rows(out / "eval.jsonl", clean, held, config.seed)
    facts = {
        name: [(categories[k], clean.sources[k], clean.tokens[k]) for k in positions]
        for name, positions in (("train", train), ("eval", held), ("available", available))
    }
    return write_report(out, tally, facts, data.shares if data else {})


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.curate",
        "Clean, de-duplicate, split and mix distilled answers; write ms-swift's training files and a report.",
        "python -m fastmtp.curate --input distilled.jsonl --recipe configs/curate.yaml --data configs/data/local.yaml \\\n"
        "    --exclude bench/math_500.jsonl bench/mt_bench.jsonl --out data/mix",
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
    given = {name: getattr(args, name) for name in ("data", "exclude", "eval_share", "seed")}
    config = dataclasses.replace(
        config, **{name: value for name, value in given.items() if value is not None}
    )
    if not 0 <= config.eval_share < 1:
        raise InputError(f"--eval-share must be at least 0 and below 1, not {config.eval_share}")
    at_least(args, 1, "workers")
    for path in args.input:
        existing(path)
    out = Path(args.out)
    try:
        counts = curate(args.input, config, out, args.workers)
        inputs = [*args.input, *config.exclude, *filter(None, [args.recipe, config.data])]
        write_provenance(out, dataclasses.asdict(config), inputs)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(f"{out}: the disk is full; free some space and run the same command again") from None
    print(
        f"{out}: {counts['train']['samples']} train, {counts['eval']['samples']} eval, dropped {counts['dropped']}"
    )


if __name__ == "__main__":
    run(main)
