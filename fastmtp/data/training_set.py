"""Training files to encoded rows, before ms-swift starts: every row is trained on, or counted and named.

ms-swift passes over a row that it cannot encode and puts another in its place. So it never sees a file: it
gets the rows that are checked here, already encoded, as a data set on disk. They lie in the order into which
ms-swift would have shuffled them.
"""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.data.training_rows import LeftOut, Rules, encode_row
from fastmtp.inputs import existing, read_jsonl

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv")
CHUNK = 500  # rows that one process encodes at a time


@dataclass
class TrainingSet:
    """The rows of some files.

    encoded: per row its sequences (ids, labels) as int32, None if it is left out. facts: what the rows depend
    on, to keep them under (`encoded_rows`); None if they are kept.
    """

    encoded: list[list[tuple[np.ndarray, np.ndarray]] | None] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason -> file:line of its first row
    facts: dict[str, object] | None = None

    @property
    def left_out(self) -> int:
        return sum(self.reasons.values())

    @property
    def tokens(self) -> int:
        return sum(len(ids) for row in self.encoded for ids, _ in row or ())

    def sequences(self, order: Sequence[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for n in range(len(self.encoded)) if order is None else order:
            yield from self.encoded[n] or ()

    def summary(self) -> str:
        """As "1200 rows, 3 left out: 2 longer than max_length 512 (first: train.jsonl:7), 1 no target"."""
        words = f"{len(self.encoded)} row{'s' * (len(self.encoded) != 1)}, {self.left_out} left out"
        if self.reasons:
            parts = [
                f"{n} {reason} (first: {self.first[reason]})" for reason, n in self.reasons.most_common()
            ]
            words += f": {'; '.join(parts)}"
        count = sum(len(row) for row in self.encoded if row)
        if count > len(self.encoded) - self.left_out:
            words += f"; {count} sequences, because the chat template rewrites earlier turns"
        return words


def read_file(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(file:line, row) of a .jsonl, .jsonl.gz, .json or .csv file. InputError for anything else."""
    path = existing(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".json":
        return _read_json(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return ((f"{path}:{number}", row) for number, row in read_jsonl(path))
    raise InputError(f"{path}: not one of {', '.join(SUFFIXES)}; convert it first")


def _read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(1 << 30)  # a whole chat may be one field
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}:{reader.line_num}: not as many fields as the first line has; fix it"
                    )
                yield f"{path}:{reader.line_num}", row
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error}); convert it to .jsonl") from None


def _read_json(path: Path) -> Iterator[tuple[str, dict]]:
    """A list of objects; or, as some tools name such a file, one object per line."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: entry {number} is not an object; fix or remove it")
        yield f"{path}: entry {number}", row


def read_set(names: Sequence[str], tokenizer, rules: Rules, processes: int = 1) -> TrainingSet:
    """Read and encode all rows of some files. `NAME#500` takes 500 of a file's rows, the first ones."""
    result = TrainingSet()
    rows = itertools.chain.from_iterable(_sample(name) for name in names)
    try:
        for chunk in _encoded(rows, tokenizer, rules, processes):
            for where, sequences, reason in chunk:
                result.encoded.append(sequences)
                if reason:
                    result.reasons[reason] += 1
                    result.first.setdefault(reason, where)
    except RecursionError:
        raise InputError(f"{', '.join(names)}: a row is nested too deeply; remove it") from None
    if not result.encoded:
        raise InputError(f"{', '.join(names)}: no rows; check the file")
    return result


def is_local(name: str) -> bool:
    """Whether a data set is a file here rather than a name on a hub, `owner/name` or `hf::owner/name`."""
    path = split_count(name)[0]
    return Path(path).exists() or path.endswith((*SUFFIXES, ".gz", ".parquet", ".txt")) or path[:1] in "./~"


def split_count(name: str) -> tuple[str, int | None]:
    """`file.jsonl#500` -> its path and how many rows to take; a path with a # in its name is itself."""
    path, mark, count = name.rpartition("#")
    return (path, int(count)) if mark and count.isdigit() and not Path(name).exists() else (name, None)


def _sample(name: str) -> Iterator[tuple[str, dict]]:
    path, count = split_count(name)
    return itertools.islice(read_file(path), count)


def _encoded(rows, tokenizer, rules: Rules, processes: int) -> Iterator[list]:
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    work = partial(_encode_chunk, rules=rules)
    if processes < 2 or len(first) < 2:
        _start(tokenizer)
        yield from map(work, chunks)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the library warns in every process
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, initializer=_start, initargs=(tokenizer,)) as pool:
        yield from pool.imap(work, chunks)


def _start(tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer


def _encode_chunk(chunk: list[tuple[str, dict]], rules: Rules) -> list[tuple[str, list | None, str | None]]:
    results = []
    for where, row in chunk:
        try:
            encoded = encode_row(_tokenizer, row, rules)
        except LeftOut as reason:
            results.append((where, None, str(reason)))
        else:
            arrays = [tuple(np.array(part, dtype=np.int32) for part in pair) for pair in encoded]
            results.append((where, arrays, None))
    return results


def shuffled(rows: int, seed: int, datasets: int) -> np.ndarray:
    """The order into which ms-swift shuffles so many rows of so many files: it draws once per file before."""
    state, top = np.random.RandomState(seed), np.iinfo(np.int32).max
    for _ in range(datasets):
        state.randint(0, top)
    return np.random.default_rng(state.randint(0, top)).permutation(rows)


def write_set(sequences: Iterator[tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    """A data set on disk as ms-swift's `cached_dataset` takes it. The plugin's template hands its rows on."""
    from datasets import Dataset, Features, Value
    from datasets import Sequence as Numbers
    from datasets.arrow_writer import ArrowWriter
    from datasets.utils import logging

    features = Features({"input_ids": Numbers(Value("int32")), "labels": Numbers(Value("int32"))})
    features["lengths"] = Numbers(Value("int64"))
    arrow = folder.with_suffix(".arrow")
    with files.disk_errors(folder), ArrowWriter(path=str(arrow), features=features) as writer:
        for ids, labels in sequences:
            writer.write({"input_ids": ids, "labels": labels, "lengths": [len(ids)]})
        writer.finalize()
        logging.disable_progress_bar()
        Dataset.from_file(str(arrow)).save_to_disk(str(folder))
    arrow.unlink()
