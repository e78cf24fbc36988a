"""Token map files: the ids that the draft head may propose, in the form that SGLang's
`--speculative-token-map` reads.

`LANG_SIZE.pt` is `torch.save` of a 1-D int64 tensor, sorted and without duplicates; `LANG_SIZE.json` beside
it says how it was made. Maps of other projects are often plain Python lists, unsorted, the end token twice:
they load here as well. Ids are rows of the model's output matrix, so a map belongs to one tokenizer;
`vocab_size` catches the crudest mix-ups.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.inputs import existing, read_json


def parse_size(text: str) -> int:
    """'32k' -> 32768, '5000' -> 5000; raises InputError for anything else."""
    digits, factor = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not (digits.isascii() and digits.isdigit() and int(digits)):
        raise InputError(
            f"size '{text}': expected a positive whole number, with or without k (1024), such as 32k or 5000"
        )
    return int(digits) * factor


def size_name(size: int) -> str:
    """32768 -> '32k'; sizes that are no multiple of 1024 are written out: '5000'."""
    return f"{size // 1024}k" if size % 1024 == 0 else str(size)


def map_name(lang: str, size: int) -> str:
    """('en', 32768) -> 'en_32k'."""
    return f"{lang}_{size_name(size)}"


def short_names(paths: Sequence[str], reserved: Sequence[str] = ()) -> list[str]:
    """What tables call the map files at `paths`: 'en_32k', or 'mine/en_32k' with its folder if two share it.

    InputError for a name in `reserved`, and for two maps that cannot be told apart.
    """
    stems = [Path(path).stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{Path(path).absolute().parent.name}/{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        if name in (*names[:number], *reserved):
            raise InputError(f"--token-map {path}: the name '{name}' is taken; rename or copy the file")
    return names


def load_token_map(path: str | Path, vocab_size: int) -> torch.LongTensor:
    """Read a map: a 1-D integer tensor or a list of ints -> [N] int64, sorted, without duplicates.

    Raises InputError for a missing or unreadable file, other content, an empty map, or ids outside [0,
    vocab_size).
    """
    path = existing(path, "token map")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever the file is, torch has an error of its own for it, of many lines,
        # and its advice, weights_only=False, would run the file's code.
        raise InputError(
            f"{path}: not a token map (torch.load refuses it); build one with fastmtp.build_vocab"
        ) from None
    if isinstance(loaded, list) and all(type(i) is int for i in loaded):
        try:
            loaded = torch.tensor(loaded, dtype=torch.int64)
        except (RuntimeError, OverflowError, ValueError):  # an int that 64 bits cannot hold
            raise InputError(
                f"{path}: ids outside 0..{vocab_size - 1}; is it for another tokenizer?"
            ) from None
    plain = isinstance(loaded, torch.Tensor) and loaded.layout == torch.strided and not loaded.is_meta
    if not plain or loaded.dim() != 1 or loaded.dtype not in _INTEGERS:
        raise InputError(
            f"{path}: expected a 1-D integer tensor or a list of ints; build one with fastmtp.build_vocab"
        )
    if not len(loaded):
        raise InputError(f"{path}: the map is empty; build it again")
    ids = loaded.to(torch.int64).unique(sorted=True)
    if ids[0] < 0 or ids[-1] >= vocab_size:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise InputError(f"{path}: id {wrong} is outside 0..{vocab_size - 1}; is it for another tokenizer?")
    return ids


def describe(path: str | Path) -> dict | None:
    """What the JSON beside a map says, as `save_token_map` wrote it; None without one.

    Raises InputError for a JSON of another kind, or of another map: nothing would be known of its tokenizer.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    if beside == path or not beside.exists():
        return None
    advice = f"move it away from {path.name}, or build the map again with fastmtp.build_vocab"
    try:
        about = read_json(beside)
    except (InputError, OSError):
        raise InputError(f"{beside}: cannot be read as the description of a token map; {advice}") from None
    facts = about.get("tokenizer")
    kinds = {"name": str, "sha256_of_vocabulary": str, "ids": int}
    if not isinstance(facts, dict) or any(type(facts.get(name)) is not kind for name, kind in kinds.items()):
        raise InputError(f"{beside}: not the description of a token map (no 'tokenizer' facts); {advice}")
    if about.get("sha256", None) not in (None, files.sha256(path)):
        raise InputError(f"{beside}: describes another map (its sha256 differs); {advice}")
    return about


def save_token_map(path: str | Path, ids: torch.LongTensor, info: dict) -> None:
    """Write `path` (NAME.pt) and NAME.json beside it, both or neither; the same ids always give the same
    bytes.

    `ids` is [N] int64, sorted, without duplicates (ValueError otherwise); the JSON is `info` with `file`,
    `size` and `sha256` of the .pt in front.
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise ValueError(f"{path}: a token map's name ends in .pt")
    if ids.dtype != torch.int64 or ids.dim() != 1 or not len(ids) or not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError("a token map is a non-empty 1-D int64 tensor in strictly rising order")
    with files.atomic(path) as temporary:
        # An open file, not a name: torch.save writes the name that it is given into the archive.
        with open(temporary, "wb") as out:
            torch.save(ids.contiguous().clone(), out)
        about = {"file": path.name, "size": len(ids), "sha256": files.sha256(temporary), **info}
        files.write_json(path.with_suffix(".json"), about)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
