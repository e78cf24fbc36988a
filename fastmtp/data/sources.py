"""Data set lists (`configs/data/*.yaml`): where prompts come from, under which licence, in what proportions.

One list serves two commands: `distill` reads the sources and how to sample from the model, `curate` the
category of each source and the share of tokens that each category should have. YAML is read strictly: an
unknown or misspelt key is an error that names it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from fastmtp.cli import InputError
from fastmtp.formats.yaml_file import load_yaml


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; the defaults are the paper's. temperature 0 is greedy."""

    max_new_tokens: int = 4096
    temperature: float = 0.6
    top_k: int = 20
    top_p: float = 0.95

    def changed(self, values: dict[str, float]) -> Sampling:
        """With the given values (from the command line) in place of its own."""
        return dataclasses.replace(self, **values)

    def check(self, before: str) -> None:
        """InputError for a value that no sampler takes; `before` goes before its name, "--" for an option."""
        for name, good, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not good:
                shown = name.replace("_", "-") if before == "--" else name
                raise InputError(f"{before}{shown} must be {rule}, not {getattr(self, name)}")


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
    extra: str | None = None  # (column appended to it after an empty line, if it is not empty)
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

    def check(self, path: str) -> None:
        """InputError if the list contradicts itself; `path` is the file that it was read from."""
        names = [source.name for source in self.sources]
        if not names:
            raise InputError(f"{path}: 'sources' is empty; name at least one data set")
        for source in self.sources:
            here = f"{path}: source '{source.name}'"
            if names.count(source.name) > 1:
                raise InputError(f"{here} is listed twice; give each its own name")
            if (source.path is None) == (source.hub is None):
                raise InputError(f"{here}: give one of 'path' and 'hub'")
            if (source.prompt is None) == (source.messages is None):
                raise InputError(f"{here}: give one of 'prompt' and 'messages' (a column name)")
            if self.shares and source.category not in self.shares:
                raise InputError(f"{here}: category '{source.category}' has no share; add it to 'shares'")
        for key, count in (
            ("samples", self.samples),
            *((f"{s.name}.samples", s.samples) for s in self.sources),
        ):
            if count is not None and count < 1:
                raise InputError(f"{path}: '{key}' must be at least 1, not {count}")
        for name, share in self.shares.items():
            if not share >= 0:
                raise InputError(f"{path}: the share of '{name}' must be 0 or more, not {share}")
        if self.shares and not abs(sum(self.shares.values()) - 1) <= 1e-6:
            raise InputError(f"{path}: 'shares' sum to {sum(self.shares.values()):g}; make them sum to 1")


def load_samplings(path: str | Path, default: Sampling) -> dict[str, Sampling]:
    """A YAML of `source: {temperature: ...}` blocks; what a block leaves out is the default's. Raises
    InputError.
    """
    blocks = load_yaml(path, dict[str, dict[str, float]])
    names = [item.name for item in dataclasses.fields(Sampling)]
    samplings = {}
    for source, values in blocks.items():
        for name in values:
            if name not in names:
                raise InputError(f"{path}: unknown key '{source}.{name}'; known: {', '.join(names)}")
        changes = {name: type(getattr(default, name))(value) for name, value in values.items()}
        for name, value in values.items():
            if changes[name] != value:
                raise InputError(f"{path}: '{source}.{name}' must be a whole number, not {value}")
        samplings[source] = default.changed(changes)
        samplings[source].check(f"{path}: {source}.")
    return samplings
