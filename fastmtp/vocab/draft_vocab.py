"""Which token map a request drafts with: the policy behind `--token-maps`, one for server, decoder and
acceptance.

`auto` follows the language: what the request asks for (`draft_lang`), else what its prompt is written in,
looked at again every 16 tokens of the answer. Requests of several languages in one batch share `mixed`, a map
of the same size made from all of them. `fixed:NAME` never switches; `union` drafts from all maps together,
and pays for their size.

    python -m fastmtp.serve --model M --token-maps en=vocab/qwen2/en_32k.pt,zh=vocab/qwen2/zh_32k.pt
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from fastmtp import files, hub
from fastmtp.cli import InputError
from fastmtp.inputs import shipped
from fastmtp.tokenizer import fingerprint, load_tokenizer
from fastmtp.vocab.script_table import WINDOW, ScriptTable, build
from fastmtp.vocab.token_map import describe, load_token_map

LOOK_EVERY = 16  # answer tokens between two looks: a changed language costs at most so many poor drafts
AUTO, FIXED, UNION, MIXED = "auto", "fixed:", "union", "mixed"

_warned: set[str] = set()  # maps that this process has warned of
logger = logging.getLogger(__name__)


@dataclass
class DraftVocab:
    """maps: {name: [K] int64, sorted}, all of one size; `mixed` is among them. policy: auto, fixed:NAME or
    union.
    """

    maps: dict[str, Tensor]
    policy: str
    scripts: ScriptTable
    warned: set = field(default_factory=set)

    def first(self) -> str:
        """The map before any request; with fixed:NAME and union the only one."""
        return MIXED if self.policy == AUTO else self.policy.removeprefix(FIXED)

    def follow(self, prompt_ids: Sequence[int], asked: object = None) -> Follower:
        """The map of one request as it grows. `asked`: a map's name, what the request's `draft_lang` says."""
        return Follower(self, prompt_ids, asked)

    def named(self, lang: object) -> str:
        """The map of a language; `mixed` for one that has none, with a warning the first time."""
        if isinstance(lang, str) and lang in self.maps:
            return lang
        if str(lang) not in self.warned and len(self.warned) < 100:
            self.warned.add(str(lang))
            logger.warning("draft vocabulary: no token map for %r; the map '%s' is used", lang, MIXED)
        return MIXED

    def together(self, names: Iterable[str]) -> str:
        """The map of a batch whose requests want `names`."""
        needed = set(names)
        return needed.pop() if len(needed) == 1 else MIXED

    def save(self, path: Path) -> None:
        """One file with all that the server needs; `load` reads it."""
        scripts = {
            "kind": torch.from_numpy(self.scripts.kind),
            "weight": torch.from_numpy(self.scripts.weight),
        }
        files.claim(path)
        with files.atomic(path) as temporary:
            torch.save({"maps": self.maps, "policy": self.policy, "scripts": scripts}, temporary)

    @classmethod
    def load(cls, path: str | Path) -> DraftVocab:
        """What `save` wrote."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        scripts = ScriptTable(saved["scripts"]["kind"].numpy(), saved["scripts"]["weight"].numpy())
        return cls(saved["maps"], saved["policy"], scripts)


class Follower:
    """One request's map: `name` now, `look(output_ids)` as the answer grows."""

    def __init__(self, vocab: DraftVocab, prompt_ids: Sequence[int], asked: object):
        self.vocab, self.looked = vocab, 0
        self.fixed = vocab.policy != AUTO or asked is not None
        if vocab.policy != AUTO:
            self.name = vocab.first()
        elif asked is not None:
            self.name = vocab.named(asked)
        else:
            lang = vocab.scripts.prompt_language(prompt_ids)
            self.name = MIXED if lang is None else vocab.named(lang)

    def look(self, output_ids: Sequence[int]) -> str:
        """The map to draft with after `output_ids`, which only grow. Looks after every 16th token, at the 64
        before it: so however many tokens come at once, the choice is the same.
        """
        seen = len(output_ids) // LOOK_EVERY
        if seen > self.looked and not self.fixed:
            self.looked = seen
            lang = self.vocab.scripts.language(
                output_ids[max(0, seen * LOOK_EVERY - WINDOW) : seen * LOOK_EVERY]
            )
            if lang is not None:
                self.name = self.vocab.named(lang)
        return self.name


def names_by_anchor(vocab: DraftVocab, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> list[str]:
    """For answer tokens 0..n-2: the map that drafts what follows each, as a server with one stream would
    choose.
    """
    follower = vocab.follow(prompt_ids)
    return [follower.look(output_ids[: i + 1]) for i in range(len(output_ids) - 1)]


def mix(maps: Sequence[Tensor], size: int) -> Tensor:
    """A map of `size` ids out of several: what all share first, then each one's lowest ids in turn.

    Maps keep no ranks; ids of byte-pair tokenizers are ranks, of the text that the tokenizer was trained on.
    """
    ids, counts = torch.cat(list(maps)).unique(return_counts=True)
    shared = ids[counts == len(maps)].tolist()
    own = [m[~torch.isin(m, ids[counts == len(maps)])].tolist() for m in maps]
    turns = [i for turn in zip_longest(*own) for i in turn if i is not None]
    return torch.tensor(list(dict.fromkeys(shared + turns))[:size], dtype=torch.int64).sort().values


def union(maps: dict[str, Tensor]) -> Tensor:
    """All languages' maps together, sorted int64; `mixed` is no language."""
    return torch.cat([ids for name, ids in maps.items() if name != MIXED]).unique()


def parse_maps(text: str) -> dict[str, str]:
    """'en=a.pt,zh=b.pt' -> {'en': 'a.pt', 'zh': 'b.pt'}. Raises InputError."""
    paths: dict[str, str] = {}
    for part in text.split(","):
        name, equals, path = part.partition("=")
        if not (equals and path and name.isidentifier()) or name in paths or name == UNION:
            raise InputError(
                f"--token-maps {part}: expected NAME=PATH pairs with a comma between, each name once"
            )
        paths[name] = hub.token_map(shipped(path))
    if not paths.keys() - {MIXED}:
        raise InputError("--token-maps: give at least one language's map, such as en=vocab/qwen2/en_32k.pt")
    return paths


def read(text: str, policy: str, tokenizer, vocab_size: int) -> DraftVocab:
    """The policy of `--token-maps` and `--vocab-policy` for a model's tokenizer and output rows.

    Raises InputError for a missing file, a map of another tokenizer, maps of unequal size, an unknown policy.
    """
    paths = parse_maps(text)
    maps = {}
    for name, path in paths.items():
        maps[name] = load_map(path, tokenizer, vocab_size)
    langs = {name: ids for name, ids in maps.items() if name != MIXED}
    if policy == UNION:
        maps = {UNION: union(maps)}
        maps[MIXED] = maps[UNION]
    else:
        sizes = {name: len(ids) for name, ids in maps.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(
                f"--token-maps: maps of one size are needed, these have {listed}; build them with one --sizes"
            )
        maps.setdefault(MIXED, mix(list(langs.values()), len(next(iter(langs.values())))))
        if policy != AUTO and not (policy.startswith(FIXED) and policy.removeprefix(FIXED) in maps):
            raise InputError(
                f"--vocab-policy {policy}: expected auto, union or fixed:NAME with NAME one of "
                f"{', '.join(maps)}"
            )
    return DraftVocab(maps, policy, build(tokenizer))


def warn_of_lacking(path: str | Path, ids: Tensor, tokenizer) -> None:
    """One line if a map has no id of special or added tokens; the end token is named first."""
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} - {*ids.tolist()}
    if special:
        first = min(special, key=lambda i: (i != tokenizer.eos_token_id, i))
        print(
            f"warning: {path}: {len(special)} special tokens are not in this map, such as "
            f"{tokenizer.convert_ids_to_tokens(first)}; they are never drafted, which costs speed and "
            "changes no text",
            file=sys.stderr,
        )


def load_map(path: str | Path, tokenizer, vocab_size: int) -> Tensor:
    """One map for a model's output rows and tokenizer (or the folder to load that from): [K] int64.

    Every command loads maps here. Raises InputError for any other file, for ids beyond the rows, and if the
    JSON beside the map is not its description or names another tokenizer. A map without one is another
    project's: it is used as it is, with a warning if special tokens are not in it.
    """
    ids = load_token_map(path, vocab_size)
    about = describe(path)
    if about:
        facts = about["tokenizer"]
        tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else tokenizer
        # A tokenizer that only adds ids behind the map's is the same.
        if fingerprint(tokenizer, facts["ids"]) != facts["sha256_of_vocabulary"]:
            raise InputError(
                f"{path}: made for another tokenizer ('{facts['name']}') than the model's; build one with "
                "fastmtp.build_vocab"
            )
    elif str(path) not in _warned:
        _warned.add(str(path))
        with contextlib.suppress(InputError):  # a folder without a tokenizer: the engine speaks of it
            warn_of_lacking(path, ids, tokenizer)
    return ids
