"""How often each token occurs in a corpus, per language, with a held-out slice counted apart.

Worker processes read, tokenise and count a chunk each; what they send back is a few thousand counts, which
are summed in one table of V counts per language. Long texts are tokenised in pieces. So memory does not grow
with the corpus or its longest row, and sums do not depend on the number of workers. The tables are saved as
they grow; `Counts.load` brings them back.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.show.progress import Bar
from fastmtp.vocab.corpus import Answer, Chunk, Row, answers
from fastmtp.vocab.lang import LOOK_AT, detect

SAVE_EVERY = 15.0  # seconds of work that a killed count may lose
COUNTED, HELD_OUT = 0, 1  # rows of a table
PIECE = 200_000  # characters that are tokenised at once: some 170 bytes of memory per token
Key = tuple[str, int]  # language, COUNTED or HELD_OUT


class Found(NamedTuple):
    """One chunk's counts: (language, COUNTED or HELD_OUT, ids that occur, how often), and what else there
    was.
    """

    tallies: list[tuple[str, int, np.ndarray, np.ndarray]]
    rows: int
    text_bytes: int
    bad: list[str]


@dataclass
class Counts:
    """What was found. `tables[lang]` is [2, V] int64: occurrences of each id in the counted and the held-out
    rows.
    """

    size: int  # V: the tokenizer's highest id + 1
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    chunks: int = 0
    rows: int = 0
    text_bytes: int = 0  # of text that was tokenised
    bad: int = 0
    first_bad: str = ""

    @property
    def tokens(self) -> int:
        return int(sum(table.sum() for table in self.tables.values()))

    def save(self, path: Path) -> None:
        head = {name: value for name, value in vars(self).items() if name != "tables"}
        with files.atomic(path) as temporary, open(temporary, "wb") as out:
            np.savez(out, head=np.array(json.dumps(head)), **self.tables)

    def add(self, found: Found) -> None:
        for lang, side, ids, occurrences in found.tallies:
            table = self.tables.setdefault(lang, np.zeros((2, self.size), dtype=np.int64))
            table[side, ids] += occurrences
        self.chunks += 1
        self.rows += found.rows
        self.text_bytes += found.text_bytes
        self.bad += len(found.bad)
        self.first_bad = self.first_bad or "".join(found.bad[:1])

    @classmethod
    def load(cls, path: Path) -> Counts:
        with np.load(path, allow_pickle=False) as saved:
            tables = {name: saved[name] for name in saved.files if name != "head"}
            return cls(tables=tables, **json.loads(str(saved["head"])))


class Counter:
    """The rules of a count: tokenizer, text column, language, held-out share, whether broken rows are
    skipped.

    `lang` None: each row's language is detected; otherwise all text is in that language. A share `held_out`
    of the
    rows is counted apart, chosen by a hash of content and seed: copies of a row fall on the same side.
    """

    def __init__(
        self, tokenizer, column: str | None, lang: str | None, held_out: float, seed: int, skip_bad: bool
    ):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the cores out, each has one
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.size = max(tokenizer.get_vocab().values()) + 1
        self.end = (
            [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        )  # a slow property: read once
        self.column, self.lang, self.skip_bad = column, lang, skip_bad
        self.held_out, self.key = held_out, str(seed).encode()

    def count(
        self,
        chunks: Iterable[Chunk],
        counts: Counts,
        workers: int = 1,
        state: Path | None = None,
        total: int | None = None,
    ) -> None:
        """Add the chunks to `counts`, passing over the `counts.chunks` that it already holds.

        `state` is where the tables are saved now and then, `total` the corpus's bytes on disk for the
        progress bar. Raises InputError for ids that are not the tokenizer's, and for a broken row unless
        these are skipped.
        """
        saved, before, chunks = time.monotonic(), counts.tokens, iter(chunks)
        with Bar(total=total, desc="count", unit="B", unit_scale=True) as bar:
            for chunk in islice(chunks, counts.chunks):
                bar.update(chunk.position)
            for chunk, found in self._parallel(chunks, workers) if workers > 1 else self._serial(chunks):
                counts.add(found)
                bar.update(chunk.position)
                rate = (counts.tokens - before) / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s")
                if state and time.monotonic() - saved > SAVE_EVERY:
                    counts.save(state)
                    saved = time.monotonic()

    def _serial(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Found]]:
        for chunk in chunks:
            yield chunk, self.tally(chunk)

    def _parallel(self, chunks: Iterator[Chunk], workers: int) -> Iterator[tuple[Chunk, Found]]:
        """In order, with at most two chunks per worker under way: an executor's own `map` would read the
        whole corpus.
        """
        # Forked workers share the tokenizer's memory instead of loading their own.
        gc.collect()
        gc.freeze()  # else every collection in a worker copies the pages it looks at
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(self, os.getpid())
        )
        waiting: deque = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_tally, chunk)))
                if len(waiting) >= 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            gc.unfreeze()

    def tally(self, chunk: Chunk) -> Found:
        """Count one chunk. Raises InputError as `count` does."""
        rows, bad = self._read(chunk)
        tables: dict[Key, np.ndarray] = {}
        batch: list[tuple[Key, str | list[int]]] = []  # texts and token ids that wait to be counted together
        text_bytes = waiting = 0
        for _, turns in rows:
            key = self._key(turns)
            for answer in turns:
                if answer.ids is None:
                    text_bytes += len(answer.text.encode())
                for part in pieces(answer.text) if answer.ids is None else (answer.ids,):
                    batch.append((key, part))
                    waiting += len(part)
                    if waiting >= PIECE:
                        self._count(batch, tables)
                        batch, waiting = [], 0
                if answer.closed:
                    batch.append((key, self.end))
        self._count(batch, tables)
        tallies = []
        for (lang, side), table in tables.items():
            ids = np.flatnonzero(table)
            tallies.append((lang, side, ids, table[ids]))
        return Found(tallies, len(rows), text_bytes, bad)

    def _count(self, batch: list[tuple[Key, str | list[int]]], tables: dict[Key, np.ndarray]) -> None:
        """Add the tokens of a batch to its keys' tables."""
        texts = [part for _, part in batch if isinstance(part, str)]
        encoded = (e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False))
        lists: dict[Key, list[list[int]]] = defaultdict(list)
        for key, part in batch:
            lists[key].append(next(encoded) if isinstance(part, str) else part)
        for key, parts in lists.items():
            ids = np.fromiter(chain.from_iterable(parts), dtype=np.int64)
            table = tables.setdefault(key, np.zeros(self.size, dtype=np.int64))
            table += np.bincount(ids, minlength=self.size)

    def _key(self, turns: list[Answer]) -> Key:
        """The language of a row and the side it falls on."""
        digest = hashlib.blake2b(key=self.key, digest_size=8)
        words = []
        for answer in turns:
            digest.update((json.dumps(answer.ids) if answer.ids is not None else answer.text).encode())
            if not self.lang:
                text = answer.text
                words.append(self.tokenizer.decode(answer.ids[:LOOK_AT]) if text is None else text[:LOOK_AT])
        side = HELD_OUT if int.from_bytes(digest.digest(), "little") < self.held_out * 2**64 else COUNTED
        return self.lang or detect("\n".join(words)), side

    def _read(self, chunk: Chunk) -> tuple[list[tuple[Row, list[Answer]]], list[str]]:
        rows, bad = [], []
        for row in chunk.rows:
            try:
                rows.append((row, answers(row, self.column)))
            except InputError as error:
                if not self.skip_bad:
                    raise InputError(f"{error}, or pass --on-error skip") from None
                bad.append(str(error))
        self._check_ids(rows)
        return rows, bad

    def _check_ids(self, rows: list[tuple[Row, list[Answer]]]) -> None:
        """A map from another tokenizer's ids would be worthless, so this is never skipped."""
        exact = [(row, answer) for row, turns in rows for answer in turns if answer.ids is not None]
        for row, answer in exact:
            if not 0 <= min(answer.ids) <= max(answer.ids) < self.size:
                raise InputError(
                    f"{row.where}: token id {max(answer.ids)} is not the tokenizer's (its ids end at "
                    f"{self.size - 1}); pass the --tokenizer of the model that answered"
                )
        for row, answer in [pair for pair in exact if pair[1].text is not None][:1]:
            if self.tokenizer.decode(answer.ids, skip_special_tokens=True).strip() != answer.text.strip():
                raise InputError(
                    f"{row.where}: with this tokenizer the token ids do not spell the text beside them; "
                    "pass the --tokenizer of the model that answered"
                )


def pieces(text: str) -> Iterator[str]:
    """A text as it is, or a very long one in pieces that are cut before a space, if there is one."""
    begin = 0
    while len(text) - begin > PIECE:
        cut = text.rfind(" ", begin + PIECE // 2, begin + PIECE)
        cut = begin + PIECE if cut < 0 else cut
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


_counter: Counter  # a worker's own, from its parent's memory


def _start_worker(counter: Counter, parent: int) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it, and ends the workers

    def watch() -> None:
        # A killed parent cannot end its workers, and they would wait for work forever.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _tally(chunk: Chunk) -> Found:
    return _counter.tally(chunk)
