"""Which static tree is worth its nodes: fitted and judged on ranks, without decoding.

Along an accepted path the drafts equal the text, so the ranks of the text's own tokens among the drafts say
what any static tree would have accepted. ranks: one [n-1, K] table per answer of n tokens, from
`reference.ranks.measure_ranks`. Row i is the anchor whose next token is answer token i; ranks[i, k] is the
place of answer token i+k+1 among the drafts of step k+1, MISS if no draft can be that token.

Fitting takes the paths that the most anchors follow. A path cannot be followed more often than its beginning,
so attaching the best node again and again comes to the same, and no tree of its size accepts more per anchor
of these answers. (Sequoia, arXiv 2402.12374, builds trees from one probability per rank; here each path has
its own.) A larger tree contains the smaller ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from fastmtp.cli import InputError
from fastmtp.tau import Acceptance, stride
from fastmtp.trees.tree import Path, StaticTree

MISS = 2**31 - 1  # no rank: outside the token map, or past the end of the answer


def halves(answers: Sequence) -> tuple[list, list]:
    """Answers to fit on and answers to judge on: every other one, so that both halves have each source."""
    return list(answers[0::2]), list(answers[1::2])


def shares(ranks: Sequence[Tensor], depth: int) -> dict[Path, float]:
    """Share of the anchors that follow each path of at most `depth` drafts, the most followed first. Of
    equals, the shorter path and the lower ranks come first.
    """
    counts: Counter[Path] = Counter()
    anchors = 0
    for table in ranks:
        for row in table[:, :depth].tolist():
            anchors += 1
            for end, rank in enumerate(row, start=1):
                if rank == MISS:
                    break
                counts[tuple(row[:end])] += 1
    order = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return {path: counts[path] / anchors for path in order}


def fit(ranks: Sequence[Tensor], nodes: int, depth: int) -> StaticTree:
    """The tree of `nodes` nodes, the root included, and at most `depth` drafts deep that accepts the most per
    anchor. Raises InputError if the answers have too few different paths.
    """
    paths = list(shares(ranks, depth))
    if len(paths) < nodes - 1:
        raise InputError(
            f"a tree of {nodes} nodes cannot be fitted: only {len(paths)} paths occur in {len(ranks)} "
            "answers; give more answers or ask for fewer nodes"
        )
    return StaticTree(tuple(paths[: nodes - 1]))


def accepted(tree: StaticTree, ranks: Tensor) -> list[int]:
    """Drafts that `tree` would have accepted at each anchor. ranks: [n-1, K], K at least the tree's depth."""
    paths = {*tree.paths}
    result = []
    for row in ranks[:, : tree.depth].tolist():
        end = 0
        while end < tree.depth and tuple(row[: end + 1]) in paths:
            end += 1
        result.append(end)
    return result


def acceptance(tree: StaticTree, ranks: Sequence[Tensor]) -> Acceptance:
    """What decoding the answers with `tree` would count."""
    total = Acceptance()
    for table in ranks:
        total.add(len(table) + 1, stride(accepted(tree, table), tree.depth))
    return total
