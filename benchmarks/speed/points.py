"""What the speed model measures: points (K, draft head, accept length) under variants of engine settings, and
their servers.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import shapes
from fastmtp.cli import InputError
from fastmtp.engines import sglang
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang_flags import DUMMY, MEASURED, canonical, merged, streams, without
from fastmtp.files import atomic
from fastmtp.trees.tree import DynamicTree
from fastmtp.vocab.draft_vocab import DraftVocab
from fastmtp.vocab.script_table import ScriptTable
from fastmtp.vocab.token_map import parse_size


@dataclass(frozen=True)
class Variant:
    """Engine settings to compare: SGLang's flags and environment variables. The nameless one has none.

    base: the variant whose plain decoding is the measure, where these settings touch drafting alone.
    """

    name: str = ""
    base: str = ""
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict, hash=False)

    def plain_flags(self) -> list[str]:
        """Those that make sense without drafts."""
        drafting = [flag for flag in self.flags if flag.startswith("--speculative-")]
        return without(self.flags, drafting)


def parse_variants(items: list[str]) -> list[Variant]:
    """`NAME[:BASE]=[VARIABLE=VALUE ...] [SGLang flags]` each. Raises InputError for another form."""
    variants = []
    for item in items:
        match = re.fullmatch(r"(\w[\w-]*)(?::(\w[\w-]*))?=(.*)", item, re.DOTALL)
        if not match:
            raise InputError(
                f"--variant {item}: expected NAME=FLAGS, for example 'fa3=--attention-backend fa3'"
            )
        name, base, rest = match.groups()
        if base and base not in {v.name for v in variants if not v.base}:
            raise InputError(
                f"--variant {item}: no variant {base} with plain decoding of its own before it; list it first"
            )
        words = shlex.split(rest)
        first = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
        pairs = [word.partition("=") for word in words[:first]]
        if not all(sign for _, sign, _ in pairs):
            raise InputError(f"--variant {item}: only VARIABLE=VALUE may come before the flags")
        variants.append(
            Variant(
                name,
                base or "",
                tuple(canonical(words[first:])),
                {key: value for key, _, value in pairs},
            )
        )
    doubled = {v.name for v in variants if sum(w.name == v.name for w in variants) > 1}
    if doubled:
        raise InputError(f"--variant: {', '.join(sorted(doubled))} is named twice")
    return variants or [Variant()]


@dataclass(frozen=True)
class Point:
    """One server. num_steps 0: plain decoding; head_rows: draft vocabulary; tau: simulated accept length;
    tree: instead of a chain; adaptive: SGLang changes the number of steps while it runs.
    """

    num_steps: int
    map_name: str | None
    head_rows: int
    tau: float
    variant: Variant = Variant()
    repeat: bool = False
    tree: DynamicTree | None = None
    adaptive: bool = False

    @property
    def name(self) -> str:
        what = f"k{self.num_steps}-{self.map_name or 'full'}" if self.num_steps else "baseline"
        what += f"@tree{self.tree.topk}x{self.tree.nodes}" if self.tree else ""
        what += "@adaptive" if self.adaptive else ""
        return (
            (f"{self.variant.name}." if self.variant.name else "") + what + ("-repeat" if self.repeat else "")
        )

    @property
    def extended(self) -> bool:
        """Whether our own draft model shortens the draft's vocabulary, instead of SGLang's
        --speculative-token-map.
        """
        return bool(self.map_name) and sglang.EXTERNAL_PACKAGE in self.variant.environment

    def settings(self) -> dict:
        """What this point's measurement depends on, besides what is the same for a whole run."""
        own = {"num_steps": self.num_steps, "head_rows": self.head_rows, "accept length": f"{self.tau:.9f}"}
        own |= {"tree": asdict(self.tree)} if self.tree else {}
        own |= {"adaptive": True} if self.adaptive else {}
        environment = {k: v for k, v in self.environment().items() if k != "PYTHONPATH"}
        return own | {"variant flags": list(self.variant.flags), "variant environment": environment}

    def environment(self) -> dict[str, str]:
        """What makes SGLang accept `tau` tokens per pass on average. A chain's drafts
        then are the output; for trees SGLang can only put one token in their place.
        """
        own = self.variant.environment
        kept = {k: v for k, v in own.items() if k != sglang.EXTERNAL_PACKAGE or self.extended}
        kept |= sglang.tree_environment(self.tree, own)
        if not self.num_steps:
            return kept
        return kept | {
            "SGLANG_SIMULATE_ACC_LEN": f"{self.tau:.4f}",
            "SGLANG_SIMULATE_ACC_METHOD": "match-expected",
            "SGLANG_SIMULATE_ACC_TOKEN_MODE": "fixed" if self.tree else "real-draft-token",
        }


def points(
    shape: dict, steps: str, maps: str, rates: shapes.Rates, variants: list[Variant], repeat: bool = False
) -> list[Point]:
    """For each variant plain decoding, then every K with every map, then plain decoding again if `repeat`.

    Raises InputError for what cannot be measured.
    """
    try:
        step_counts = [int(step) for step in steps.split(",")]
    except ValueError:
        raise InputError(f"--steps {steps}: expected whole numbers such as 1,2,3") from None
    if min(step_counts) < 1:
        raise InputError(f"--steps {steps}: plain decoding is measured anyway; give numbers from 1")
    sizes = [(None if name == "full" else name, head_rows(shape, name)) for name in maps.split(",")]
    result = []
    for variant in variants:
        plain = [] if variant.base else [Point(0, None, shape["vocab_size"], 1.0, variant)]
        result += plain
        result += [
            Point(k, name, rows, rates.tau(k, name), variant) for name, rows in sizes for k in step_counts
        ]
        result += [replace(point, repeat=True) for point in plain if repeat]
    return result


def head_rows(shape: dict, name: str) -> int:
    """Rows of a draft vocabulary by its name: `full`, `32k` or `en_32k`. Raises InputError."""
    if name == "full":
        return shape["vocab_size"]
    rows = parse_size(re.sub(r"^[A-Za-z_]+", "", name))
    if rows > shape["vocab_size"]:
        raise InputError(f"map {name}: larger than the vocabulary of {shape['vocab_size']}")
    return rows


LISTED = re.compile(
    r"(?:(?P<variant>\w[\w-]*)\.)?"
    r"(?:plain|(?P<steps>[1-9]\d?)(?:\+(?P<map>\w[\w-]*))?"
    r"(?:@tree(?P<topk>\d+)x(?P<nodes>\d+)|(?P<adaptive>@adaptive))?)"
)


def listed(
    shape: dict, names: str, rates: shapes.Rates, variants: list[Variant], gains: dict[DynamicTree, float]
) -> list[Point]:
    """`plain,3+32k,fa3.3+32k@tree4x16,3+32k@adaptive`: these points alone, each under the variant before its
    dot.

    gains: what a tree accepts of what the chain of its depth accepts. Raises InputError for what cannot be.
    """
    by_name = {variant.name: variant for variant in [*variants, Variant()]}
    result = []
    for name in names.split(","):
        match = LISTED.fullmatch(name.strip())
        if not match or (match["variant"] or "") not in by_name:
            raise InputError(
                f"--points {name}: expected [VARIANT.]plain or [VARIANT.]K[+MAP][@treeTOPKxNODES|@adaptive], "
                "each VARIANT with a --variant"
            )
        steps, map_name = int(match["steps"] or 0), match["map"]
        rows = head_rows(shape, map_name or "full")
        try:
            tree = DynamicTree(int(match["topk"]), steps, int(match["nodes"])) if match["nodes"] else None
        except ValueError as error:
            raise InputError(f"--points {name}: {error}") from None
        tau = rates.tau(steps, map_name) * gains.get(tree, 1.0) if steps else 1.0
        variant = by_name[match["variant"] or ""]
        result.append(Point(steps, map_name, rows, tau, variant, tree=tree, adaptive=bool(match["adaptive"])))
    if twice := [point.name for n, point in enumerate(result) if point in result[:n]]:
        raise InputError(f"--points: {twice[0]} is named twice")
    return result


def parse_gains(items: list[str]) -> dict[DynamicTree, float]:
    """`TOPK,DEPTH,NODES=RATIO` each. Raises InputError for another form."""
    gains = {}
    for item in items:
        text, _, ratio = item.partition("=")
        try:
            gains[DynamicTree(*map(int, text.split(",")))] = float(ratio)
        except (TypeError, ValueError) as error:
            raise InputError(f"--tree-gain {item}: expected TOPK,DEPTH,NODES=RATIO ({error})") from None
    return gains


def command(point: Point, folder: Path, port: int, flags: list[str]) -> list[str]:
    """SGLang's command line for one point; the map's file is made beside the model folder."""
    token_map = None
    if point.map_name and not point.extended:
        # Which rows does not matter to speed; how many does.
        token_map = folder / f"map_{point.map_name}.pt"
        with atomic(token_map) as temporary:
            torch.save(torch.arange(point.head_rows, dtype=torch.int64), temporary)
    own = list(point.variant.flags) if point.num_steps else point.variant.plain_flags()
    flags = merged([*DUMMY, *MEASURED, *streams(1)], merged(own, flags))
    serving = Serving(
        str(folder),
        point.num_steps,
        token_map and str(token_map),
        tree=point.tree,
        adaptive=point.adaptive,
        port=port,
        flags=flags,
    )
    return sglang.command(serving)


def vocabulary(point: Point, folder: Path) -> dict[str, str]:
    """Environment in which our own draft model takes the point's map; its file is made beside the model
    folder.
    """
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    no_letters = ScriptTable(np.zeros(vocab_size, np.uint8), np.zeros(vocab_size, np.float32))
    path = folder / f"vocab_{point.map_name}.pt"
    DraftVocab({"all": torch.arange(point.head_rows)}, "fixed:all", no_letters).save(path)
    return sglang.extension(path)
