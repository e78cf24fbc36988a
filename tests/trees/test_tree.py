"""The structure of draft trees: paths, masks, the walk, and how dynamic trees are drawn."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmtp.trees.tree import Drawing, DynamicTree, StaticTree, chain_parents, depths, mask, walk

#        0
#      / | \
#     1  2  3      ranks 0 1 4
#    / \    |
#   4   5   6
#   |
#   7
TREE = StaticTree(((0,), (1,), (4,), (0, 0), (0, 1), (4, 0), (0, 0, 2)))


@st.composite
def trees(draw) -> StaticTree:
    """Grown node by node from what is already there."""
    paths: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, 20))):
        paths.append((*draw(st.sampled_from(paths)), draw(st.integers(0, 4))))
    return StaticTree(tuple({path for path in paths if path}))


def ancestors(parents: list[int], node: int) -> set[int]:
    return {node} | (ancestors(parents, parents[node]) if node else set())


def draw(tree, logits_of, token_map=None) -> Drawing:
    """Draw `tree` from `logits_of(path of tokens)`, without a head."""
    drawing = Drawing([0])
    for _ in range(tree.depth):
        paths = [path_to(drawing, node) for node in drawing.frontier]
        tree.grow(drawing, torch.stack([logits_of(path) for path in paths]), token_map)
    return tree.finish(drawing)


def path_to(drawing: Drawing, node: int) -> tuple[int, ...]:
    """Tokens from the root's child to `node`."""
    return (*path_to(drawing, drawing.parents[node]), drawing.tokens[node]) if node else ()


def test_a_tree_by_hand():
    assert TREE.parents == [-1, 0, 0, 0, 1, 1, 3, 4]
    assert (TREE.nodes, TREE.depth, TREE.topk, TREE.expanded) == (8, 3, 5, 3)
    assert depths(TREE.parents) == [0, 1, 1, 1, 2, 2, 2, 3]
    assert mask(TREE.parents)[7].nonzero().flatten().tolist() == [0, 1, 4, 7]
    assert mask(TREE.parents)[6].nonzero().flatten().tolist() == [0, 3, 6]


@given(trees())
def test_parents_come_before_children_and_the_mask_holds_the_ancestors(tree):
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert all(path[:-1] in {(), *tree.paths} for path in tree.paths)
    assert depths(tree.parents) == [0, *map(len, tree.paths)]
    for node, row in enumerate(mask(tree.parents)):
        assert set(row.nonzero().flatten().tolist()) == ancestors(tree.parents, node)
    assert tree == StaticTree(tuple(reversed(tree.paths)))


def test_a_chain_is_a_tree_of_width_one():
    chain = StaticTree.chain(4)
    assert chain.parents == chain_parents(4) == [-1, 0, 1, 2, 3] and chain.expanded == 3
    assert torch.equal(mask(chain.parents), torch.ones(5, 5).tril().bool())


@pytest.mark.parametrize(
    "paths", [(), ((),), ((0, 0),), ((0,), (1, 0)), ((-1,),), ((0.0,),), ((True,),)], ids=str
)
def test_what_is_no_tree_is_refused(paths):
    with pytest.raises(ValueError):
        StaticTree(paths)


def test_the_walk_by_hand():
    tokens = [9, 10, 11, 12, 20, 21, 20, 30]
    after = {0: 10, 1: 20, 4: 31, 3: 20, 6: 5, 7: 1}
    assert walk(tokens, TREE.parents, after.__getitem__) == ([1, 4], 31)
    assert walk(tokens, TREE.parents, (after | {4: 30}).__getitem__) == ([1, 4, 7], 1)
    assert walk(tokens, TREE.parents, (after | {0: 12}).__getitem__) == ([3, 6], 5)
    assert walk(tokens, TREE.parents, (after | {0: 20}).__getitem__) == ([], 20)  # a grandchild's token
    assert walk([9], [-1], lambda _: 4) == ([], 4)


@given(trees(), st.integers(0, 2**31))
def test_a_static_tree_holds_the_tokens_of_its_ranks(tree, seed):
    def logits_of(path):
        return torch.randn(12, generator=torch.Generator().manual_seed(hash(path) ^ seed))

    token_map = torch.arange(5, 41, 3)
    drawing = draw(tree, logits_of, token_map)
    assert drawing.parents == tree.parents and drawing.frontier == []
    for node, path in enumerate(tree.paths, start=1):
        before = path_to(drawing, drawing.parents[node])
        order = logits_of(before).argsort(descending=True)
        assert drawing.tokens[node] == token_map[order[path[-1]]]


def naive_dynamic(tree: DynamicTree, logits_of) -> dict[tuple[int, ...], float]:
    """{path: cumulative probability} of what the rule keeps, with sets of paths alone."""
    beams, drawn = {(): 1.0}, {}
    for _ in range(tree.depth):
        level = {}
        for path, score in beams.items():
            chances = logits_of(path).softmax(-1)
            likeliest = sorted(range(len(chances)), key=lambda t: -float(chances[t]))[: tree.topk]
            level |= {(*path, token): score * float(chances[token]) for token in likeliest}
        beams = dict(sorted(level.items(), key=lambda item: -item[1])[: tree.topk])
        drawn |= level
    return dict(sorted(drawn.items(), key=lambda item: -item[1])[: tree.nodes - 1])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 60), st.integers(0, 2**31))
def test_a_dynamic_tree_is_the_best_of_what_is_drawn(topk, depth, nodes, seed):
    most = topk + (depth - 1) * topk**2 + 1
    tree = DynamicTree(topk, depth, depth + 1 if topk == 1 else min(nodes, most))

    def logits_of(path):
        return 2 * torch.randn(9, generator=torch.Generator().manual_seed(hash(path) ^ seed))

    drawing = draw(tree, logits_of)
    assert len(drawing.tokens) == tree.nodes
    assert all(parent < node for node, parent in enumerate(drawing.parents))
    kept = {path_to(drawing, node): drawing.scores[node] for node in range(1, tree.nodes)}
    expected = naive_dynamic(tree, logits_of)
    assert kept.keys() == expected.keys()
    assert all(math.isclose(kept[path], expected[path], rel_tol=1e-5) for path in kept)


def test_of_equal_drafts_the_parent_is_kept():
    """A head that is certain: a child's cumulative probability equals its parent's."""
    certain = torch.tensor([0.0, 200.0, 0.0, 0.0])
    for nodes in range(2, 12):
        drawing = draw(DynamicTree(2, 4, nodes), lambda _: certain)
        assert all(0 <= parent < node for node, parent in enumerate(drawing.parents[1:], start=1))
        assert max(depths(drawing.parents)) == min(nodes - 1, 4)


def test_a_dynamic_tree_that_cannot_be_drawn_is_refused():
    for numbers in itertools.chain([(0, 1, 2), (1, 0, 2), (2, 1, 1), (1, 3, 3)], [(2, 2, 8), (4, 1, 6)]):
        with pytest.raises(ValueError):
            DynamicTree(*numbers)
    assert DynamicTree(4, 3, 16).expanded == 8
