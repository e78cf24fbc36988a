"""Weights in safetensors files: which files a folder has, what their headers say, reading them one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from fastmtp.cli import InputError
from fastmtp.inputs import existing, read_json

INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")


class Entry(NamedTuple):
    """A tensor as its file's header describes it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: str | Path, prefix: str = "") -> list[Path]:
    """The safetensors files that make up a model or checkpoint folder. InputError if there are none, or if
    one that the index names is not there. With `prefix`, only those with tensors of such names, if there is
    an index to say so: of a model whose head alone is needed the others may be absent.
    """
    folder = existing(folder, "folder")
    everything = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file() and folder / "model.safetensors" not in everything:
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{folder / INDEX}: no weight_map in it; copy the folder again")
        listed = sorted({folder / Path(path).name for name, path in names.items() if name.startswith(prefix)})
        absent = [path.name for path in listed if path not in everything]
        if absent:
            raise InputError(
                f"{folder}: {INDEX} names {absent[0]}, which is not there ({len(absent)} of {len(listed)} "
                "files missing); copy the folder again"
            )
        return listed
    if not everything:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        what = f", only {pickled[0]}, which is never loaded because it can run code" if pickled else ""
        raise InputError(
            f"{folder}: no .safetensors file{what}; give a model or checkpoint folder in safetensors format"
        )
    return everything


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes in a safetensors file. InputError for one that is torn or something else."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        try:
            if not 2 <= length <= size - 8:
                raise ValueError
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((value["data_offsets"][1] for value in header.values()), default=0)
            entries = {n: Entry(path, v["dtype"], tuple(v["shape"])) for n, v in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            kinds = {b"version ": "a git-lfs pointer (run: git lfs pull)", b"<!DOCTYP": "an HTML page"}
            kind = kinds.get(first, "an HTML page" if first[:1] == b"<" else "torn or of another kind")
            raise InputError(f"{path}: not a safetensors file but {kind}; copy it again") from None
    if end != size - 8 - length:
        raise InputError(
            f"{path}: torn: {size:,} bytes, its header describes {end + 8 + length:,}; copy it again"
        )
    return entries


def headers(folder: str | Path, prefix: str = "") -> dict[str, Entry]:
    """Every tensor of a folder's `weight_files`, from their headers alone. Raises InputError."""
    entries: dict[str, Entry] = {}
    for path in weight_files(folder, prefix):
        for name, entry in read_header(path).items():
            if name in entries:
                raise InputError(f"{folder}: {name} is in {entries[name].path.name} and in {path.name}")
            entries[name] = entry
    return entries


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str | Path) -> None:
    """InputError naming the first tensor that holds an infinite value or a NaN."""
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {name} has values that are not finite; copy it again or train again")


def read_tensors(entries: dict[str, Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) one after the other, each file opened once."""
    for path in sorted({entry.path for entry in entries.values()}):
        with safe_open(path, framework="pt") as tensors:
            for name in (name for name, entry in entries.items() if entry.path == path):
                yield name, tensors.get_tensor(name)
