"""How often each token occurs in a corpus, per language, with a held-out slice counted apart.

One process: the tokenizer's own threads use all cores on a chunk while Python reads the next one and adds up the one
before. What is kept is one table of V counts a language, so memory does not grow with the corpus, and sums do not
depend on the number of threads. The tables are saved as they grow; `Counts.load` brings them back.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.corpus import Answer, Chunk, Row, answers
from fastmtp.lang import detect

SAVE_EVERY = 15.0  # seconds of work that a killed count may lose
COUNTED, HELD_OUT = 0, 1  # rows of a table


@dataclass
class Counts:
    """What was found. `tables[lang]` is [2, V] int64: occurrences of each id in the counted and the held-out rows."""

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

    @classmethod
    def load(cls, path: Path) -> Counts:
        with np.load(path, allow_pickle=False) as saved:
            tables = {name: saved[name] for name in saved.files if name != "head"}
            return cls(tables=tables, **json.loads(str(saved["head"])))


class Counter:
    """The rules of a count: tokenizer, text column, language, held-out share, whether broken rows are skipped.

    `lang` None: each row's language is detected; otherwise all text is in that language. A share `held_out` of the
    rows is counted apart, chosen by a hash of content and seed: copies of a row fall on the same side.
    """

    def __init__(self, tokenizer, column: str | None, lang: str | None, held_out: float, seed: int, skip_bad: bool):
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.size = max(tokenizer.get_vocab().values()) + 1
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]  # a slow property: read once
        self.column, self.lang, self.skip_bad = column, lang, skip_bad
        self.held_out, self.key = held_out, str(seed).encode()

    def count(
        self, chunks: Iterable[Chunk], counts: Counts, state: Path | None = None, total: int | None = None
    ) -> None:
        """Add the chunks to `counts`, passing over the `counts.chunks` that it already holds.

        `state` is where the tables are saved now and then, `total` the corpus's bytes on disk for the progress bar.
        Raises InputError for ids that are not the tokenizer's, and for a broken row unless these are skipped.
        """
        saved, before = time.monotonic(), counts.tokens
        with (
            tqdm(total=total, desc="count", unit="B", unit_scale=True, disable=None) as bar,
            ThreadPoolExecutor(1) as pool,
        ):
            chunks = iter(chunks)
            for chunk in islice(chunks, counts.chunks):
                bar.update(chunk.position)
            for chunk, rows, bad, encoded in self._pipeline(chunks, pool):
                self._add(counts, rows, (encoding.ids for encoding in encoded.result()))
                counts.chunks += 1
                counts.bad += len(bad)
                counts.first_bad = counts.first_bad or (bad[0] if bad else "")
                bar.update(chunk.position)
                rate = (counts.tokens - before) / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s")
                if state and time.monotonic() - saved > SAVE_EVERY:
                    counts.save(state)
                    saved = time.monotonic()

    def _pipeline(self, chunks: Iterator[Chunk], pool: ThreadPoolExecutor) -> Iterator[tuple]:
        """(chunk, rows, complaints, future encodings), one chunk behind the reading, so that both go on at once."""
        waiting = None
        for chunk in chunks:
            rows, bad = self._read(chunk)
            texts = [answer.text for _, turns in rows for answer in turns if answer.ids is None]
            encoded: Future = pool.submit(self.backend.encode_batch_fast, texts, add_special_tokens=False)
            if waiting:
                yield waiting
            waiting = (chunk, rows, bad, encoded)
        if waiting:
            yield waiting

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
                    f"{row.where}: token id {max(answer.ids)} is not the tokenizer's (its ids end at {self.size - 1}); "
                    "pass the --tokenizer of the model that answered"
                )
        for row, answer in [pair for pair in exact if pair[1].text is not None][:1]:
            if self.tokenizer.decode(answer.ids, skip_special_tokens=True).strip() != answer.text.strip():
                raise InputError(
                    f"{row.where}: with this tokenizer the token ids do not spell the text beside them; "
                    "pass the --tokenizer of the model that answered"
                )

    def _add(self, counts: Counts, rows: list[tuple[Row, list[Answer]]], encoded: Iterator[list[int]]) -> None:
        groups: dict[tuple[str, int], list[list[int]]] = defaultdict(list)
        for _, turns in rows:
            digest = hashlib.blake2b(key=self.key, digest_size=8)
            words = []
            for answer in turns:
                content = json.dumps(answer.ids) if answer.ids is not None else answer.text
                digest.update(content.encode())
                counts.text_bytes += len(content.encode()) if answer.ids is None else 0
                if not self.lang:
                    words.append(answer.text if answer.text is not None else self.tokenizer.decode(answer.ids))
            lang = self.lang or detect("\n".join(words))
            side = HELD_OUT if int.from_bytes(digest.digest(), "little") < self.held_out * 2**64 else COUNTED
            for answer in turns:
                groups[lang, side].append(answer.ids if answer.ids is not None else next(encoded))
                if answer.closed:
                    groups[lang, side].append(self.end)
        for (lang, side), lists in groups.items():
            ids = np.fromiter(chain.from_iterable(lists), dtype=np.int64)
            table = counts.tables.setdefault(lang, np.zeros((2, self.size), dtype=np.int64))
            table[side] += np.bincount(ids, minlength=self.size)
        counts.rows += len(rows)
