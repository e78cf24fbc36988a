"""Arms over the GPUs of one machine: one server a card, each asked one at a time, a baseline on every card.

Two cards of one host differ by a percent or two in speed. So every card measures the baseline too, and an
arm's speed-up is against the baseline of its own card.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import replace

from fastmtp.cli import InputError


def visible() -> list[str]:
    """The machine's GPUs as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, line in enumerate(answer.stdout.splitlines()) if line.startswith("GPU")]


def chosen(count: int) -> list[str]:
    """The first `count` GPUs; [] for one, which a server finds by itself. InputError if there are fewer."""
    if count == 1:
        return []
    names = visible()
    if len(names) < count:
        raise InputError(f"--gpus {count}: this machine shows {len(names)}; give a smaller number")
    return names[:count]


def named(name: str, card: int) -> str:
    """What the arm `name` is called on a card: baselines run on every one."""
    return f"{name}_gpu{card}" if card else name


def spread(arms: list, count: int) -> list:
    """Arms in turn over `count` cards; the baseline, if there is one, first and on each card that is used."""
    drafting = [arm for arm in arms if arm.num_steps]
    drafting = [replace(arm, card=number % count) for number, arm in enumerate(drafting)]
    plain = [arm for arm in arms if not arm.num_steps]
    used = range(min(count, max(1, len(drafting))))
    return [replace(arm, name=named(arm.name, card), card=card) for arm in plain for card in used] + drafting


def rounds(jobs: Iterable[tuple], count: int) -> list[list[tuple]]:
    """Jobs (arm, ...) in rounds, each with at most one job per card; the order on a card is kept."""
    queues: list[list[tuple]] = [[] for _ in range(count)]
    for job in jobs:
        queues[job[0].card].append(job)
    longest = max(map(len, queues), default=0)
    return [[queue[turn] for queue in queues if turn < len(queue)] for turn in range(longest)]
