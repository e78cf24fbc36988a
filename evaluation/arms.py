"""Arms: `baseline`, `vanilla:K`, `fastmtp:K`, each speculative one with `+MAP` for a draft vocabulary.

K is the number of draft steps. `vanilla` is the head as it was before training and lives in a model folder
of its own; `baseline` is the same model without drafts. `@treeTOPKxNODES` drafts a tree, `@sampled` draws the
drafts at random instead of taking the likeliest, and `@adaptive` lets SGLang change the number of steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fastmtp import hub
from fastmtp.cli import InputError
from fastmtp.engines.sglang import ADAPTIVE_STEPS
from fastmtp.inputs import existing, resource
from fastmtp.trees.tree import DynamicTree

TOPK = 4  # of an arm's tree that names its nodes alone


@dataclass(frozen=True)
class Arm:
    """num_steps 0: plain decoding. token_map: a path, or None for the full head. tree: instead of a chain.
    sampled: drafts are drawn from the head's distribution. adaptive: SGLang takes up to num_steps.
    card: which of --gpus.
    """

    name: str
    model: str
    num_steps: int
    token_map: str | None
    map_name: str | None = None
    tree: DynamicTree | None = None
    sampled: bool = False
    adaptive: bool = False
    card: int = 0

    @property
    def folder(self) -> str:
        """The name as a folder name."""
        return self.name.replace(":", "-")


def parse_arms(names: str, model: str, vanilla_model: str | None, token_maps: list[str]) -> list[Arm]:
    """`--arms` and `--token-map NAME=PATH ...` -> arms, baseline first. Raises InputError for what cannot be
    run.
    """
    maps = dict(_named(item) for item in token_maps)
    arms = [_drafted(name.strip(), model, vanilla_model, maps) for name in names.split(",") if name.strip()]
    if not arms:
        raise InputError("--arms: empty; for example --arms baseline,fastmtp:3")
    doubled = {a.name for a in arms if sum(b.name == a.name for b in arms) > 1}
    if doubled:
        raise InputError(f"--arms: {', '.join(sorted(doubled))} is named twice; name each arm once")
    return sorted(arms, key=lambda arm: arm.num_steps > 0)  # stable: only the baseline moves


def _named(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if not equals or not name or not path:
        raise InputError(f"--token-map {item}: expected NAME=PATH, for example en32k=vocab/smollm2/en_32k.pt")
    return name, str(existing(hub.token_map(str(resource(path))), "token map"))


def _drafted(name: str, model: str, vanilla_model: str | None, maps: dict[str, str]) -> Arm:
    """An arm, with or without @sampled or @adaptive."""
    match = re.fullmatch(r"(.*?)(@sampled|@adaptive)?", name, re.DOTALL)
    arm, how = _arm(match[1], model, vanilla_model, maps), match[2]
    if how and not arm.num_steps:
        raise InputError(f"--arms: '{name}': plain decoding has no drafts; leave {how} out")
    if how == "@adaptive" and (arm.tree or arm.num_steps != ADAPTIVE_STEPS):
        raise InputError(
            f"--arms: '{name}': SGLang changes chains of up to {ADAPTIVE_STEPS} steps; give "
            f"{match[1].partition(':')[0]}:{ADAPTIVE_STEPS}@adaptive, with +MAP before the @"
        )
    return replace(arm, name=name, sampled=how == "@sampled", adaptive=how == "@adaptive")


def _arm(name: str, model: str, vanilla_model: str | None, maps: dict[str, str]) -> Arm:
    if name == "baseline":
        return Arm(name, model, 0, None)
    match = re.fullmatch(r"(vanilla|fastmtp):([1-9]\d?)(?:\+(\w[\w.-]*))?(?:@tree(?:(\d+)x)?(\d+))?", name)
    if not match:
        raise InputError(
            f"--arms: '{name}' is not baseline, vanilla:K or fastmtp:K, with +MAP for a token map and "
            "@treeTOPKxNODES for a draft tree, @sampled for drafts drawn at random or @adaptive for SGLang's "
            "changing number of steps"
        )
    kind, steps, map_name, topk, nodes = match.groups()
    if map_name and map_name not in maps:
        raise InputError(f"--arms: '{name}' needs --token-map {map_name}=PATH")
    if kind == "vanilla" and not vanilla_model:
        raise InputError(f"--arms: '{name}' needs --vanilla-model, the folder with the head before training")
    folder = vanilla_model if kind == "vanilla" else model
    tree = _tree(name, int(topk or TOPK), int(steps), int(nodes)) if nodes else None
    return Arm(name, folder, int(steps), maps.get(map_name) if map_name else None, map_name, tree)


def _tree(arm: str, topk: int, depth: int, nodes: int) -> DynamicTree:
    try:
        return DynamicTree(topk, depth, nodes)
    except ValueError as error:
        raise InputError(f"--arms: '{arm}': {error}") from None
