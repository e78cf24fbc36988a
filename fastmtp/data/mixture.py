"""The mix of a curation: samples drawn so that each category has its share of the tokens."""

from __future__ import annotations

import random

from fastmtp.cli import InputError
from fastmtp.data.sources import DataConfig


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


def quotas(data: DataConfig, counts: dict[str, int], limit: int) -> dict[str, int]:
    """Source -> how many of its `counts` rows make up `limit` prompts by the list's shares, or all rows.

    A category's share goes to its sources by their size. What a scarce source lacks goes to the others, in
    their proportions. Without shares every row counts alike.
    """
    sizes: dict[str, int] = {}
    for source in data.sources:
        sizes[source.category] = sizes.get(source.category, 0) + counts[source.name]
    weights = {
        source.name: data.shares.get(source.category, 0.0 if data.shares else sizes[source.category])
        * counts[source.name]
        / max(1, sizes[source.category])
        for source in data.sources
    }
    takes, left = dict.fromkeys(counts, 0), min(limit, sum(counts[n] for n, w in weights.items() if w > 0))
    open_ = {name for name, weight in weights.items() if weight > 0}
    while left and open_:
        each = left / sum(weights[name] for name in open_)
        full = {name for name in open_ if weights[name] * each >= counts[name]}
        if not full:  # every source that is left has more than its part
            exact = {name: weights[name] * each for name in open_}
            takes |= {name: int(part) for name, part in exact.items()}
            rest = left - sum(takes[name] for name in open_)
            for name in sorted(open_, key=lambda name: (takes[name] - exact[name], name))[:rest]:
                takes[name] += 1
            break
        takes |= {name: counts[name] for name in full}
        left -= sum(counts[name] for name in full)
        open_ -= full
    return takes
