"""The mix of a curation: samples drawn so that each category has its share of the tokens."""

from __future__ import annotations

import random

from fastmtp.cli import InputError


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
