"""Arms: `baseline`, `vanilla:K`, `fastmtp:K`, each speculative one with `+MAP` for a draft vocabulary.

K is the number of draft steps. `vanilla` is the head as it was before training and lives in a model folder of its
own; `baseline` is the same model without drafts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastmtp.cli import InputError
from fastmtp.files import existing

REPEAT = "baseline_repeat"


@dataclass(frozen=True)
class Arm:
    """num_steps 0: plain decoding. token_map: a path, or None for the full head."""

    name: str
    model: str
    num_steps: int
    token_map: str | None
    map_name: str | None = None

    @property
    def folder(self) -> str:
        """The name as a folder name."""
        return self.name.replace(":", "-")


def parse_arms(names: str, model: str, vanilla_model: str | None, token_maps: list[str]) -> list[Arm]:
    """`--arms` and `--token-map NAME=PATH ...` -> arms, baseline first. Raises InputError for what cannot be run."""
    maps = dict(_named(item) for item in token_maps)
    arms = [_arm(name.strip(), model, vanilla_model, maps) for name in names.split(",") if name.strip()]
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
    return name, str(existing(path, "token map"))


def _arm(name: str, model: str, vanilla_model: str | None, maps: dict[str, str]) -> Arm:
    if name == "baseline":
        return Arm(name, model, 0, None)
    match = re.fullmatch(r"(vanilla|fastmtp):([1-9]\d?)(?:\+(\w[\w.-]*))?", name)
    if not match:
        raise InputError(f"--arms: '{name}' is not baseline, vanilla:K or fastmtp:K, with +MAP for a token map")
    kind, steps, map_name = match.groups()
    if map_name and map_name not in maps:
        raise InputError(f"--arms: '{name}' needs --token-map {map_name}=PATH")
    if kind == "vanilla" and not vanilla_model:
        raise InputError(f"--arms: '{name}' needs --vanilla-model, the folder with the head before training")
    folder = vanilla_model if kind == "vanilla" else model
    return Arm(name, folder, int(steps), maps.get(map_name) if map_name else None, map_name)
