"""What a result depends on, by content: model, head, maps, data; engine, version, device, dtype, flags.

Every key that decides whether a kept result may be used again is made here. Names and times say nothing: a
folder that was copied or touched is the same, a head exchanged under the same name is another.

    facts = fingerprint({"model": folder, "token map": path}, {"dtype": "float32", "num_steps": 3})
    differences(before, facts)      # ["model: other content", "num_steps: 3 -> 5"]
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastmtp.cli import InputError

CACHE = ".fingerprints.json"  # hashes of a folder's files, each with the size and times it was read at
MATTERS = (".safetensors", ".bin", ".pt", ".gguf", ".json", ".jsonl", ".model", ".txt", ".jinja", ".tiktoken")
NO_CONTENT = {"run.json", CACHE}  # say when and how a folder was made, not what it is
SMALL = 1 << 20  # bytes below which a hash is cheaper to make again than to keep


def content(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, or of what matters in a folder: weights, configuration, tokenizer.

    Large files are hashed once and remembered in a hidden file beside them, with their size, times and inode.
    Raises InputError for a path that does not exist or cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            names = sorted(
                p for p in path.iterdir() if p.suffix in MATTERS and p.name not in NO_CONTENT and p.is_file()
            )
            with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter
                entries = dict(zip([p.name for p in names], pool.map(_hash, names), strict=True))
            _remember(path, entries)
            return _digest([[name, entry["sha256"]] for name, entry in entries.items()])
        entry = _hash(path)
        _remember(path.parent, {path.name: entry})
        return entry["sha256"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


Content = str | Path | Sequence[str | Path] | None


def fingerprint(contents: Mapping[str, Content], settings: Mapping[str, object]) -> dict[str, object]:
    """One flat dict of all that a result depends on, fit for JSON.

    contents: name -> file, folder or several of them, hashed by content; None or [] means that there is none.
    settings: name -> value that JSON can hold. A name in both is a ValueError. Of a head, give its weight
    files alone: a checkpoint folder also holds the optimiser's state.
    """
    twice = contents.keys() & settings.keys()
    if twice:
        raise ValueError(f"named twice: {', '.join(sorted(twice))}")
    return {name: _tag(source) for name, source in contents.items()} | json.loads(json.dumps(dict(settings)))


def _tag(source: Content) -> str | None:
    if not source:
        return None
    if isinstance(source, (str, Path)):
        return f"sha256:{content(source)}"
    return f"sha256:{_digest([content(path) for path in source])}"


def digest(facts: Mapping[str, object]) -> str:
    """A fingerprint as 16 hex digits."""
    return _digest(dict(facts))[:16]


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What is not the same in two fingerprints, in words, one entry per name."""
    words = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        both = [str(value).startswith("sha256:") for value in (old, new)]
        words.append(f"{name}: other content" if all(both) else f"{name}: {_shown(old)} -> {_shown(new)}")
    return words


def machine() -> dict[str, str | None]:
    """What computes in this process: versions of torch and transformers, and the first GPU."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return versions | {"gpu": gpu_name()}


@functools.cache
def code() -> str:
    """Hex SHA-256 of this package's own sources, for results that a change of the code must not survive."""
    package = Path(__file__).resolve().parent
    sources = sorted(package.rglob("*.py"))
    return _digest([[str(p.relative_to(package)), p.read_text(encoding="utf-8")] for p in sources])


@functools.cache
def gpu_name() -> str | None:
    """Name of the first GPU, asked without making a context on it; None without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].strip() or None if lines else None


def _shown(value: object) -> str:
    return (
        "none"
        if value is None
        else "other content"
        if str(value).startswith("sha256:")
        else json.dumps(value)
    )


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash(path: Path) -> dict:
    """{"stamp", "sha256"} of a file, from the cache if its stamp is still the same."""
    stamp = _stamp(path)  # taken first: a file that changes while it is read is read again next time
    if stamp[0] >= SMALL:
        known = _read(path.parent).get(path.name)
        if known and known["stamp"] == stamp:
            return known
    with open(path, "rb") as stream:
        return {"stamp": stamp, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _read(folder: Path) -> dict:
    try:
        cache = json.loads((folder / CACHE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(cache, dict) and all(
        isinstance(entry, dict) and {"stamp", "sha256"} <= entry.keys() for entry in cache.values()
    )
    return cache if whole else {}


def _remember(folder: Path, entries: dict[str, dict]) -> None:
    """Keep the hashes of large files. A folder that cannot be written is hashed again each time."""
    large = {name: entry for name, entry in entries.items() if entry["stamp"][0] >= SMALL}
    known = _read(folder)
    if not large or all(known.get(name) == entry for name, entry in large.items()):
        return
    with contextlib.suppress(OSError):  # such as another process that does the same
        temporary = folder / (CACHE + ".tmp")
        try:
            temporary.write_text(json.dumps(known | large), encoding="utf-8")
            os.replace(temporary, folder / CACHE)
        finally:
            temporary.unlink(missing_ok=True)
