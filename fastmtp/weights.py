"""What lies in a folder's weight files, from their headers alone: names, dtypes and shapes.

Headers show what makes a folder unusable: a missing tensor, one too many, a wrong shape or dtype, a file that
was cut short. So 60 GB are refused in a moment, in one line.

    check("models/qwen", {"lm_head.weight": (151936, 896), ...})
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastmtp import files
from fastmtp.cli import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32")  # safetensors' names of the numbers that we compute with
LFS = b"version https://git-lfs"
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """One tensor as its file's header describes it. dtype: safetensors' name, such as BF16."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def read(folder: str | Path) -> dict[str, Entry]:
    """Every tensor that transformers and the engines would load from a model folder, by name.

    With an index these are the tensors that it names. Raises InputError for a folder without weights, an
    index that names what is not there, and a file that is torn or no safetensors file at all.
    """
    folder = files.existing(folder, "folder")
    index = folder / INDEX
    if not index.exists():
        paths = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
        if not paths:
            raise InputError(f"{folder}: no .safetensors file; give a model or checkpoint folder")
        return {name: entry for path in paths for name, entry in read_file(path).items()}

    # An index is the truth for every reader, so it must be complete and agree with the files.
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: has no weight_map from tensors to files; copy it again")
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        raise InputError(
            f"{folder}: both {SINGLE} and an index of other files; remove the ones that are not meant"
        )
    entries: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        path = folder / name
        if not path.exists():
            raise InputError(f"{path}: is missing, although {INDEX} names it; copy it again")
        inside = read_file(path)
        entries |= {
            tensor: inside[tensor] for tensor, file in weight_map.items() if file == name and tensor in inside
        }
    absent = weight_map.keys() - entries.keys()
    if absent:
        raise InputError(f"{index}: names tensors that its files lack: {shown(absent)}; copy it again")
    return entries


def read_file(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises InputError for a file that is torn or of another kind."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        text = start + stream.read(min(length, HEADER_LIMIT, size)) if len(start) == 8 else start
    if text.startswith(LFS):
        raise InputError(f"{path}: a git-lfs pointer instead of weights; run `git lfs pull` in that folder")
    if len(start) < 8 or length + 8 > size or length > HEADER_LIMIT:
        raise InputError(f"{path}: not a whole safetensors file ({size} bytes); copy it again")
    try:
        header = json.loads(text[8:])
        header.pop("__metadata__", None)
        entries = {n: Entry(path, str(e["dtype"]), tuple(map(int, e["shape"]))) for n, e in header.items()}
        end = max((int(e["data_offsets"][1]) for e in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{path}: not a safetensors file (no readable header); copy it again") from None
    if 8 + length + end != size:
        raise InputError(f"{path}: cut short, {size} bytes of {8 + length + end}; copy it again")
    return entries


def check(
    folder: str | Path, shapes: Mapping[str, tuple[int, ...]], optional: Iterable[str] = (), cure: str = ""
) -> dict[str, Entry]:
    """`read`, and an InputError unless the folder holds exactly the tensors of `shapes`, in floating point.

    optional: names that may be absent, such as `lm_head.weight` of a tied model. cure: what to do about
    missing or unexpected tensors.
    """
    entries = {
        name: entry for name, entry in read(folder).items() if not name.endswith("rotary_emb.inv_freq")
    }
    missing, extra = shapes.keys() - entries.keys() - set(optional), entries.keys() - shapes.keys()
    words = [f"lacks {shown(missing)}"] * bool(missing) + [f"has {shown(extra)} too many"] * bool(extra)
    cure = cure or "copy the folder again"
    if words:
        raise InputError(f"{folder}: {' and '.join(words)}; {cure}")
    for name, entry in entries.items():
        if entry.dtype not in FLOATS:
            raise InputError(
                f"{entry.path}: {name} is {entry.dtype}, not one of {', '.join(FLOATS)}; "
                "give the model before it was quantised"
            )
        if entry.shape != tuple(shapes[name]):
            raise InputError(
                f"{entry.path}: {name} has the shape {list(entry.shape)}, "
                f"config.json says {list(shapes[name])}; {cure}"
            )
    return entries


def refuse_quantised(folder: str | Path, config: Mapping) -> None:
    """InputError for a configuration of quantised weights, which mean nothing without their scales."""
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
        raise InputError(f"{folder}: quantised weights ({method}); give the model before it was quantised")


def shown(names: Iterable[str]) -> str:
    """At most three names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
