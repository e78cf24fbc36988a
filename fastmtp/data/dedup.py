"""Near-duplicates by MinHash (datasketch) and banding, and contamination by benchmark questions.

A sample is the set of its neighbouring pairs of units: words, numbers and operators (units.py). Editing a
tenth of the words leaves about 0.7 of Jaccard similarity and seldom less than 0.65, while different samples
seldom pass 0.5; 0.62 parts them. Prompts are compared by themselves as well: a model asked nearly the same
thing twice answers in different words, and both answers teach the same thing. Prompts that differ in numbers
and operators alone are different questions, however long the words around them.

datasketch gives the signatures; the banding is in NumPy, one band at a time, because an index of Python sets
costs 10 kB a sample (measured: 1 GB for 100,000) against 0.5 kB for the signature itself.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash

from fastmtp.cli import InputError
from fastmtp.data.messages import check_messages
from fastmtp.data.units import units
from fastmtp.inputs import read_jsonl

PERMUTATIONS = 128
# Two samples of similarity s meet in some band with probability 1 - (1 - s^4)^32: 99 % at 0.6.
BANDS, ROWS = 32, 4
CROWD = 200  # larger buckets of a band are boilerplate: members are compared with the first and the next only


@dataclass
class DedupConfig:
    """The recipe's `dedup:` section. Similarities are Jaccard, estimated by MinHash, between 0 and 1."""

    threshold: float = 0.62  # whole samples, prompt and answers, at least this similar are near-duplicates
    prompt_threshold: float | None = (
        0.85  # the same for prompts alone; null keeps several answers to one prompt
    )
    split_margin: float = 0.1  # eval takes no sample that comes within this margin of a train sample
    question_overlap: float = (
        0.5  # share of a benchmark question's triples of units that makes a prompt contaminated
    )


# Signatures share one set of permutations; making it anew for each sample costs more than hashing the sample.
_PERMUTATIONS = MinHash(num_perm=PERMUTATIONS, seed=1, scheme="affine32").permutations


def shingles(text: str, n: int) -> np.ndarray:
    """Hashes of the distinct sequences of n units, sorted, uint32; a shorter text counts as one sequence."""
    parts = units(text)
    grams = zip(*(parts[i:] for i in range(n)), strict=False) if len(parts) >= n else [parts]
    return np.unique(np.fromiter((zlib.crc32(" ".join(gram).encode()) for gram in grams), dtype=np.uint32))


def signature(text: str) -> np.ndarray:
    """MinHash signature of a text's pairs of units: (PERMUTATIONS,) uint32."""
    sketch = MinHash(hashfunc=int, permutations=_PERMUTATIONS, scheme="affine32", num_perm=PERMUTATIONS)
    sketch.update_batch(shingles(text, 2))
    return sketch.hashvalues


def similar_pairs(signatures: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs that banding brings together and whose estimated similarity is at least `floor`.

    `signatures` is (N, PERMUTATIONS) uint32. Returns (i, j, similarity), i < j, int64, int64, float64, sorted
    by j, i.
    """
    keys, scores = [np.empty(0, np.int64)], [np.empty(0)]
    for band in range(BANDS):
        rows = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        buckets = rows.view(np.dtype((np.void, rows.dtype.itemsize * ROWS))).ravel()
        order = np.argsort(buckets, kind="stable")
        edges = np.flatnonzero(np.append(buckets[order][1:] != buckets[order][:-1], True)) + 1
        starts, sizes = np.append(0, edges[:-1]), np.diff(np.append(0, edges))
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            i, j = _members(order[start : start + size])
            score = (signatures[i] == signatures[j]).mean(axis=1)
            keep = score >= floor
            keys.append(j[keep] << 32 | i[keep])
            scores.append(score[keep])
    key, first = np.unique(np.concatenate(keys), return_index=True)
    return key & 0xFFFFFFFF, key >> 32, np.concatenate(scores)[first]


def _members(bucket: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i, j), i < j, of a bucket's members; `bucket` is ascending."""
    if len(bucket) <= CROWD:
        i, j = np.triu_indices(len(bucket), 1)
        return bucket[i], bucket[j]
    first = np.full(len(bucket) - 1, bucket[0])
    return np.concatenate((first, bucket[:-1])), np.concatenate((bucket[1:], bucket[1:]))


def near_duplicates(
    samples: np.ndarray,
    prompts: np.ndarray,
    config: DedupConfig,
    letters: np.ndarray | None = None,
    keys: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which samples to drop: the earlier of two near-duplicates stays, and nothing falls for one that fell
    itself.

    `samples` and `prompts` are signatures, (N, PERMUTATIONS) uint32; `letters` and `keys` are digests of the
    prompts' words and of all their units, (N,). Returns three (N,) arrays: `twin` int64,
    the kept sample that this one nearly repeats, -1 if it stays; `similarity` float64 to that twin;
    `close` bool, kept samples with a kept neighbour inside the split margin.
    """
    candidates = [(*similar_pairs(samples, config.threshold - config.split_margin), config.threshold)]
    if config.prompt_threshold is not None:
        candidates.append(
            (*similar_pairs(prompts, config.prompt_threshold - config.split_margin), config.prompt_threshold)
        )
    i, j, score = (np.concatenate([pairs[k] for pairs in candidates]) for k in range(3))
    enough = np.concatenate([pairs[2] >= pairs[3] for pairs in candidates])
    if letters is not None:  # the same words with other numbers or operators: another question
        enough &= (letters[i] != letters[j]) | (keys[i] == keys[j])
    twin = np.full(len(samples), -1, dtype=np.int64)
    similarity = np.zeros(len(samples))
    order = np.lexsort((-score, j))
    for left, right, value in zip(
        i[order].tolist(), j[order].tolist(), np.where(enough, score, 0)[order], strict=True
    ):
        if value and twin[left] < 0 and twin[right] < 0:
            twin[right], similarity[right] = left, value
    close = np.zeros(len(samples), dtype=bool)
    both = (twin[i] < 0) & (twin[j] < 0)
    close[i[both]] = close[j[both]] = True
    return twin, similarity, close


FIELDS = ("turns", "question_content", "problem", "question", "prompt", "messages")


def _question_texts(row: dict, place: str) -> list[str]:
    """What a benchmark asks in one row: its first turn, and by itself the question under a passage."""
    name = next((name for name in FIELDS if row.get(name)), None)
    if name is None:
        raise InputError(f"{place}: no question found; expected one of the fields {', '.join(FIELDS)}")
    value = row[name]
    if name == "messages":
        value = [message["content"] for message in check_messages(value, place) if message["role"] == "user"]
    # Only the first turn stands alone: "Explain your answer." is nobody's.
    first = value[0] if isinstance(value, list) and value else value
    first = first.get("content") if isinstance(first, dict) else first
    if not isinstance(first, str) or not first.strip():
        raise InputError(f"{place}: '{name}' does not begin with a text; fix or remove this line")
    text = first.strip()
    last = text.rpartition("\n")[2]
    return [text, last] if last != text and last.endswith(("?", "\uff1f")) else [text]


class Questions:
    """The benchmark questions that no prompt may contain: an index from triples of units to questions."""

    def __init__(self, paths: list[str], overlap: float):
        self.overlap = overlap
        self.names: list[str] = []
        grams: list[np.ndarray] = []
        for path in paths:
            for number, row in read_jsonl(path):
                for text in _question_texts(row, f"{path}:{number}"):
                    self.names.append(f"{path}:{number}")
                    grams.append(shingles(text, 3))
        self.sizes = np.array([len(g) for g in grams], dtype=np.int64)
        flat = np.concatenate(grams) if grams else np.empty(0, np.uint32)
        order = np.argsort(flat, kind="stable")
        self.grams = flat[order]
        self.owners = np.repeat(np.arange(len(grams)), self.sizes)[order]

    def find(self, prompt: str) -> str | None:
        """`file:line` of a benchmark question that `prompt` contains, None when there is none.

        Half of a question's triples of units (`overlap`) are enough, so that rewording a few words does not
        hide it, but at least six: "what is the meaning of ..." is half of a short question and says nothing.
        A question of fewer triples must be there whole.
        """
        if not self.names:
            return None
        own = shingles(prompt, 3)
        left, right = np.searchsorted(self.grams, own, "left"), np.searchsorted(self.grams, own, "right")
        hits = [self.owners[a:b] for a, b in zip(left, right, strict=True) if a < b]
        if not hits:
            return None
        counts = np.bincount(np.concatenate(hits), minlength=len(self.names))
        share = counts / self.sizes
        needed = np.clip(6 / self.sizes, self.overlap, 1)
        worst = int(np.argmax(share - needed))
        return self.names[worst] if share[worst] >= needed[worst] else None
