"""A draft tree as plain data: its shape, how its drafts are drawn, what its nodes see, and the walk.

Node 0 is the root, the newest committed token; every other node is a draft. A parent is numbered before its
children, so the list `parents` (-1 for the root) says all about a shape.

    static     paths of ranks: (0, 2) is the third likeliest draft after the likeliest first one. The shape
               is the same in every pass; `fit.py` chooses it
    dynamic    drawn anew in each pass by cumulative draft probability, as in EAGLE-2 (arXiv 2406.16858,
               section 4) and by SGLang's rule: each step runs the `topk` best drafts of the step before and
               draws `topk` children of each; of everything drawn, the best `nodes - 1` are verified
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Path = tuple[int, ...]  # ranks of the drafts from the root to a node


def chain_parents(num_steps: int) -> list[int]:
    """Parents of a chain of `num_steps` drafts."""
    return list(range(-1, num_steps))


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of each node, 0 for the root: what its position exceeds the root's by."""
    result: list[int] = []
    for parent in parents:
        result.append(result[parent] + 1 if result else 0)
    return result


def mask(parents: Sequence[int]) -> Tensor:
    """[n, n] bool: row i marks what node i sees of the tree, itself and its ancestors."""
    seen: list[list[bool]] = []
    for node, parent in enumerate(parents):
        seen.append(list(seen[parent]) if node else [False] * len(parents))
        seen[node][node] = True
    return torch.tensor(seen)


def walk(
    tokens: Sequence[int], parents: Sequence[int], choose: Callable[[int], int]
) -> tuple[list[int], int]:
    """(accepted nodes from the root down, next token). `choose(node)`: the token that follows `node`.

    With draws from the backbone's distribution as `choose`, the kept tokens are distributed as the backbone
    alone would draw them: they are such draws, and the drafts only save passes. It is the same rule as
    rejecting the children one by one (arXiv 2305.09781, algorithm 2), because a draft that was not drawn at
    random is accepted with its residual probability, and its rejection takes that probability alone away.
    """
    children = {
        (parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))
    }
    path, token = [], choose(0)
    while (child := children.get((path[-1] if path else 0, token))) is not None:
        path.append(child)
        token = choose(child)
    return path, token


@dataclass
class Drawing:
    """A tree with its tokens. `frontier`: the nodes drawn last that get children next; `scores`: cumulative
    draft probabilities, which dynamic trees keep.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    scores: list[float] = field(default_factory=lambda: [1.0])
    frontier: list[int] = field(default_factory=lambda: [0])

    def add(self, parent: int, token: int, score: float = 0.0) -> int:
        """A new node's number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(score)
        return len(self.tokens) - 1


@dataclass(frozen=True)
class StaticTree:
    """`paths`: of every draft, in the order of the nodes: by depth, then by rank. Raises ValueError for paths
    of which a beginning is missing.
    """

    paths: tuple[Path, ...]

    def __post_init__(self):
        paths = sorted({tuple(path) for path in self.paths}, key=lambda path: (len(path), path))
        object.__setattr__(self, "paths", tuple(paths))
        known = {(), *paths}
        for path in paths:
            if not path or any(type(rank) is not int or rank < 0 for rank in path):
                raise ValueError(f"path {list(path)} must be a list of whole numbers from 0")
            if path[:-1] not in known:
                raise ValueError(f"path {list(path)} needs the path {list(path[:-1])}, which is missing")
        if not paths:
            raise ValueError("a tree needs at least one path")

    @classmethod
    def chain(cls, num_steps: int) -> StaticTree:
        return cls(tuple((0,) * depth for depth in range(1, num_steps + 1)))

    @property
    def nodes(self) -> int:
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        return len(self.paths[-1])

    @cached_property
    def topk(self) -> int:
        """Drafts of one node that are looked at."""
        return max(path[-1] for path in self.paths) + 1

    @cached_property
    def parents(self) -> list[int]:
        number = {path: node for node, path in enumerate([(), *self.paths])}
        return [-1, *(number[path[:-1]] for path in self.paths)]

    @cached_property
    def expanded(self) -> int:
        """Drafts that the head runs on, because they have children."""
        return len({*self.parents} - {-1, 0})

    @cached_property
    def _ranks(self) -> list[list[int]]:
        """Of each node: the ranks of its children."""
        ranks: list[list[int]] = [[] for _ in range(self.nodes)]
        for parent, path in zip(self.parents[1:], self.paths, strict=True):
            ranks[parent].append(path[-1])
        return ranks

    def grow(self, drawing: Drawing, logits: Tensor, token_map: Tensor | None) -> None:
        """Draw the children of the frontier from its logits [F, V'], over the rows of `token_map`."""
        drafts = _ids(logits.topk(self.topk).indices, token_map)
        drawn = [
            drawing.add(node, tokens[rank])
            for node, tokens in zip(drawing.frontier, drafts, strict=True)
            for rank in self._ranks[node]
        ]
        drawing.frontier = [node for node in drawn if self._ranks[node]]

    def finish(self, drawing: Drawing) -> Drawing:
        return drawing

    def __str__(self) -> str:
        return f"static, {self.nodes} nodes, depth {self.depth}"


@dataclass(frozen=True)
class DynamicTree:
    """SGLang's `--speculative-eagle-topk`, `--speculative-num-steps` and `--speculative-num-draft-tokens`.
    Raises ValueError for more nodes than are drawn, and for a chain cut short.
    """

    topk: int
    depth: int
    nodes: int

    def __post_init__(self):
        if min(self.topk, self.depth) < 1 or self.nodes < 2:
            raise ValueError("topk and depth must be at least 1, nodes at least 2")
        drawn = self.topk + (self.depth - 1) * self.topk**2
        if self.nodes - 1 > drawn:
            raise ValueError(
                f"topk {self.topk} and depth {self.depth} draw {drawn} drafts, so nodes must be at most "
                f"{drawn + 1}, not {self.nodes}"
            )
        if self.topk == 1 and self.nodes != self.depth + 1:
            raise ValueError(f"topk 1 is a chain: nodes must be {self.depth + 1}, not {self.nodes}")

    @property
    def expanded(self) -> int:
        """Drafts that the head runs on."""
        return (self.depth - 1) * self.topk

    def grow(self, drawing: Drawing, logits: Tensor, token_map: Tensor | None) -> None:
        """As StaticTree.grow; the frontier becomes the `topk` best of what was drawn."""
        chances, rows = logits.float().softmax(-1).topk(self.topk)
        drawn = [
            drawing.add(node, token, drawing.scores[node] * chance)
            for node, *drafts in zip(drawing.frontier, _ids(rows, token_map), chances.tolist(), strict=True)
            for token, chance in zip(*drafts, strict=True)
        ]
        drawing.frontier = _best(drawn, drawing.scores, self.topk)

    def finish(self, drawing: Drawing) -> Drawing:
        """The root and the best `nodes - 1` drafts. No draft beats its parent, and of equals the one drawn
        first wins, so a kept draft's parent is kept.
        """
        kept = [0, *sorted(_best(range(1, len(drawing.tokens)), drawing.scores, self.nodes - 1))]
        number = {node: i for i, node in enumerate(kept)} | {-1: -1}
        tokens, parents, scores = (
            [values[node] for node in kept] for values in (drawing.tokens, drawing.parents, drawing.scores)
        )
        return Drawing(tokens, [number[parent] for parent in parents], scores, [])

    def __str__(self) -> str:
        return f"dynamic, topk {self.topk}, {self.nodes} nodes, depth {self.depth}"


DraftTree = StaticTree | DynamicTree


def _best(nodes: Sequence[int], scores: Sequence[float], count: int) -> list[int]:
    """The `count` best, best first; of equals the lower number."""
    return sorted(nodes, key=lambda node: (-scores[node], node))[:count]


def _ids(rows: Tensor, token_map: Tensor | None) -> list[list[int]]:
    return (rows if token_map is None else token_map[rows]).tolist()
