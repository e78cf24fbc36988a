"""The clean samples of a curation: all inputs read by several processes, exact duplicates left out."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from fastmtp.cli import InputError
from fastmtp.data.cleaning import CleanConfig
from fastmtp.data.curate_report import Tally
from fastmtp.data.dedup import PERMUTATIONS, DedupConfig, Questions, near_duplicates
from fastmtp.data.scan import FOREIGN, Rules, Scanned, Spelling, scan_line
from fastmtp.data.sources import DataConfig
from fastmtp.inputs import numbered_lines
from fastmtp.show.progress import Bar

CHUNK = 128  # samples that travel to a worker together
MOST_FOREIGN = 0.1  # share of samples with ids of another tokenizer beyond which the whole input is doubted
_rules: Rules


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


def _start(rules: Rules) -> None:
    global _rules
    _rules = rules


def _scan_chunk(chunk: list[tuple[str, bytes]]) -> list[Scanned]:
    return [scan_line(line, place, _rules) for place, line in chunk]


def chunks(paths: list[str]) -> Iterator[list[tuple[str, bytes]]]:
    """Non-empty lines of the files in order, as ("file:line", bytes), CHUNK at a time."""

    feed = ((f"{path}:{number}", line) for path in paths for number, line in numbered_lines(path))
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
        with Bar(desc="curate", unit="sample") as bar:
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
