"""Encoded training rows, kept in output_dir until a run is finished: continuing it encodes nothing again.

One file each for `dataset` and `val_dataset`. It is used again only if the data, the tokenizer's files, the
rules and the code that encodes are the same.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastmtp import chat, files
from fastmtp.data import samples, training_rows, training_set
from fastmtp.data.training_rows import Rules
from fastmtp.data.training_set import TrainingSet, read_set, split_count
from fastmtp.fingerprint import fingerprint
from fastmtp.formats.weights import INDEX

TOKENIZER = (".json", ".jinja", ".model", ".txt")


def kept_at(output: str | Path, key: str) -> Path:
    return Path(output) / f"encoded-{key}.npz"


def read_kept(
    path: Path, names: Sequence[str], model: str, tokenizer, rules: Rules, processes: int
) -> TrainingSet:
    """`read_set`, or what an earlier run kept in `path`."""
    facts = facts_of(names, model, rules)
    rows = load(path, facts)
    if rows is None:
        rows = read_set(names, tokenizer, rules, processes)
        rows.facts = facts
    return rows


def facts_of(names: Sequence[str], model: str, rules: Rules) -> dict[str, object]:
    """All that the encoded rows depend on."""
    others = {"run.json", INDEX}
    about = [p for p in sorted(Path(model).iterdir()) if p.suffix in TOKENIZER and p.name not in others]
    code = [module.__file__ for module in (chat, samples, training_rows, training_set)]
    contents = {"data": [split_count(name)[0] for name in names], "tokenizer": about, "code": code}
    return fingerprint(contents, {"rows": [split_count(name)[1] for name in names], "rules": asdict(rules)})


def keep(output: str | Path, sets: dict[str, TrainingSet]) -> None:
    """Keep what is not kept yet. InputError if a file of somebody else's has the name."""
    for key, rows in sets.items():
        if rows.facts is not None and _is_first():
            save(rows, kept_at(output, key))


def forget(output: str | Path, sets: dict[str, TrainingSet]) -> None:
    """Remove what is kept: a finished run does not continue."""
    for path in (kept_at(output, key) for key in sets):
        if path.exists() and files.is_ours(path) and _is_first():
            path.unlink()


def _is_first() -> bool:
    """Of several nodes, which may share the folder, the first one writes."""
    return int(os.environ.get("NODE_RANK") or 0) == 0


def save(rows: TrainingSet, path: Path) -> None:
    sequences = list(rows.sequences())
    about = {"facts": rows.facts, "reasons": rows.reasons, "first": rows.first}
    with files.atomic(path) as temporary, open(temporary, "wb") as out:
        np.savez(
            out,
            about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
            counts=np.array([-1 if row is None else len(row) for row in rows.encoded], dtype=np.int32),
            lengths=np.array([len(ids) for ids, _ in sequences], dtype=np.int64),
            ids=np.concatenate([ids for ids, _ in sequences]),
            labels=np.concatenate([labels for _, labels in sequences]),
        )


def load(path: Path, facts: dict[str, object]) -> TrainingSet | None:
    """Rows that were kept under the same facts; None if there are none."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            if about["facts"] != facts:
                return None
            counts, ends = kept["counts"], kept["lengths"].cumsum()[:-1]
            pairs = zip(np.split(kept["ids"], ends), np.split(kept["labels"], ends), strict=True)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    encoded = [None if count < 0 else [next(pairs) for _ in range(count)] for count in counts]
    return TrainingSet(encoded, Counter(about["reasons"]), about["first"])
