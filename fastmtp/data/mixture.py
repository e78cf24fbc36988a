"""Data set lists (`configs/data/*.yaml`): where prompts come from, under which licence, and in what
proportions.

One list serves two commands: `distill` reads the sources and how to sample from the model, `curate` the
category of each source and the share of tokens that each category is to have. YAML is read strictly: an
unknown or misspelt key is an error that names it, never a setting silently left at its default.
"""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastmtp.cli import InputError
from fastmtp.files import existing

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; the defaults are the paper's. temperature 0 is greedy."""

    max_new_tokens: int = 4096
    temperature: float = 0.6
    top_k: int = 20
    top_p: float = 0.95

    def changed(self, given: dict[str, float]) -> Sampling:
        """With the given values (from the command line) in place of its own."""
        return dataclasses.replace(self, **given)

    def check(self, where: str) -> None:
        """Raise InputError for a value that no sampler takes. `where`: what to put before its name, "--" for
        an option.
        """
        for name, good, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not good:
                shown = name.replace("_", "-") if where == "--" else name
                raise InputError(f"{where}{shown} must be {rule}, not {getattr(self, name)}")


@dataclass
class Source:
    """One data set. Exactly one of `path` (local .jsonl, .jsonl.gz) and `hub` (Hub data set id) is given."""

    name: str
    category: str
    licence: str
    lang: str = ""
    path: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    split: str = "train"
    prompt: str | None = None  # column with the user's text, or ...
    extra: str | None = None  # (column appended to it after an empty line, where it is not empty)
    messages: str | None = None  # ... column with a list of {"role", "content"} turns
    response: str | None = None  # column with the source's own answer, for training on it instead
    only: dict[str, list[str]] = field(
        default_factory=dict
    )  # column -> values: keep the rows with one of these
    samples: int | None = None  # take this many, at random
    rows: int | None = None  # size of the data set, for information
    note: str = ""
    sampling: Sampling | None = None  # instead of the list's


@dataclass
class DataConfig:
    """A list of sources and the mix to make of them. `shares` are by answer tokens and sum to 1."""

    sources: list[Source]
    shares: dict[str, float] = field(default_factory=dict)
    samples: int | None = (
        None  # size of the finished training set; as large as the shares allow when left out
    )
    sampling: Sampling = field(default_factory=Sampling)

    def check(self, where: str) -> None:
        """Raise InputError where the list contradicts itself."""
        names = [source.name for source in self.sources]
        for source in self.sources:
            here = f"{where}: source '{source.name}'"
            if names.count(source.name) > 1:
                raise InputError(f"{here} is listed twice; give each its own name")
            if (source.path is None) == (source.hub is None):
                raise InputError(f"{here}: give one of 'path' and 'hub'")
            if (source.prompt is None) == (source.messages is None):
                raise InputError(f"{here}: give one of 'prompt' and 'messages' (a column name)")
            if self.shares and source.category not in self.shares:
                raise InputError(f"{here}: category '{source.category}' has no share; add it to 'shares'")
        if self.shares and abs(sum(self.shares.values()) - 1) > 1e-6:
            raise InputError(f"{where}: 'shares' sum to {sum(self.shares.values()):g}; make them sum to 1")


def load_yaml(path: str | Path, kind: type[T]) -> T:
    """Read a YAML file into the dataclass `kind`; InputError names the file and the key that does not fit."""
    try:
        value = yaml.safe_load(existing(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(
            f"{path}{line}: not YAML ({getattr(error, 'problem', error)}); mend this line"
        ) from None
    return _build(kind, {} if value is None else value, str(path), "")


def load_samplings(path: str | Path, default: Sampling) -> dict[str, Sampling]:
    """A YAML of `source: {temperature: ...}` blocks; what a block leaves out is the default's. Raises
    InputError.
    """
    given = load_yaml(path, dict[str, dict[str, float]])
    names = [item.name for item in dataclasses.fields(Sampling)]
    found = {}
    for source, values in given.items():
        for name in values:
            if name not in names:
                raise InputError(f"{path}: unknown key '{source}.{name}'; known: {', '.join(names)}")
        found[source] = default.changed({n: type(getattr(default, n))(v) for n, v in values.items()})
        found[source].check(f"{path}: {source}.")
    return found


def _build(kind: Any, value: Any, where: str, key: str) -> Any:
    """`value` (from YAML) as `kind`: a dataclass, a union, a list, a dict or a plain type."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where}: '{key or kind.__name__}' must be a block of keys, not {value!r}")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                raise InputError(
                    f"{where}: unknown key '{f'{key}.{name}'.lstrip('.')}'; known: {', '.join(hints)}"
                )
        missing = dataclasses.MISSING
        for item in dataclasses.fields(kind):
            if item.default is missing and item.default_factory is missing and item.name not in value:
                raise InputError(f"{where}: '{f'{key}.{item.name}'.lstrip('.')}' is missing; add it")
        return kind(**{n: _build(hints[n], v, where, f"{key}.{n}".lstrip(".")) for n, v in value.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _build(next(a for a in args if a is not type(None)), value, where, key)
    if origin is list and isinstance(value, list):
        return [_build(args[0], v, where, f"{key}[{n}]") for n, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            _build(args[0], n, where, key): _build(args[1], v, where, f"{key}.{n}") for n, v in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise InputError(f"{where}: '{key}' must be {getattr(origin or kind, '__name__', kind)}, not {value!r}")


def choose(
    categories: list[str], tokens: list[int], shares: dict[str, float], samples: int | None, seed: int
) -> list[int]:
    """Positions of the samples that make up the mix, ascending; the same for the same seed.

    The mix is as large as the scarcest category allows without repeating anything, or as near to `samples` as
    the shares allow. Raises InputError for a category that has a share but no sample.
    """
    pools: dict[str, list[int]] = {name: [] for name, share in shares.items() if share > 0}
    for position, name in enumerate(categories):
        if name in pools:
            pools[name].append(position)
    have = {name: sum(tokens[p] for p in pool) for name, pool in pools.items()}
    for name, amount in have.items():
        if not amount:
            raise InputError(
                f"category '{name}' has a share of {shares[name]:g} but no sample; add data or drop it"
            )
    total = min(amount / shares[name] for name, amount in have.items())
    if samples is not None:
        total = min(total, samples / sum(shares[name] * len(pools[name]) / have[name] for name in pools))
    chosen: list[int] = []
    for name, pool in sorted(pools.items()):
        random.Random(f"{seed} {name}").shuffle(pool)
        left = total * shares[name]
        for position in pool:
            # The sample that crosses the line is taken when that lands nearer to it.
            if left < tokens[position] / 2:
                break
            chosen.append(position)
            left -= tokens[position]
    return sorted(chosen)
