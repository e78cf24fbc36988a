"""Fitting static trees: by hand, against every other tree, and their files."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtp.cli import InputError
from fastmtp.trees.fit import MISS, acceptance, accepted, fit, shares
from fastmtp.trees.tree import DynamicTree, StaticTree
from fastmtp.trees.tree_file import check_fits, load, parse, save

RANKS = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, MISS], [0, 0, 0], [MISS, 0, 0], [0, MISS, MISS]])


def test_shares_and_fits_by_hand():
    table = shares([RANKS], 2)
    assert table == {(0,): 4 / 6, (0, 0): 2 / 6, (1,): 1 / 6, (0, 1): 1 / 6, (1, 0): 1 / 6}
    assert list(table) == [(0,), (0, 0), (1,), (0, 1), (1, 0)]
    assert fit([RANKS], 4, 2).paths == ((0,), (1,), (0, 0))
    assert fit([RANKS[:2], RANKS[2:]], 3, 1).paths == ((0,), (1,))
    with pytest.raises(InputError, match="only 2 paths"):
        fit([RANKS], 4, 1)


def test_accepted_and_counted_by_hand():
    tree = StaticTree(((0,), (1,), (0, 0), (1, 0)))
    assert accepted(tree, RANKS) == [2, 1, 2, 2, 0, 1]
    # Anchors 0, 3 (two accepted each); 0 + 2 + 1 = 3, 3 + 2 + 1 = 6: the end.
    assert acceptance(tree, [RANKS]).histogram == [0, 0, 2]
    assert acceptance(tree, [RANKS]).output_tokens == 7


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), min_size=3, max_size=12))
def test_no_other_tree_of_its_size_accepts_more(rows):
    ranks = torch.tensor(rows)
    every = list(itertools.product(range(3))) + list(itertools.product(range(3), repeat=2))
    for nodes in range(2, min(4, len(shares([ranks], 2))) + 1):
        best = 0
        for paths in itertools.combinations(every, nodes - 1):
            if all(len(path) == 1 or path[:1] in paths for path in paths):
                best = max(best, sum(accepted(StaticTree(paths), ranks)))
        assert sum(accepted(fit([ranks], nodes, 2), ranks)) == best


def test_a_file_comes_back(tmp_path):
    tree = StaticTree(((0,), (1,), (0, 0)))
    save(tmp_path / "tree.json", tree, {"answers": 3})
    assert load(tmp_path / "tree.json") == parse(str(tmp_path / "tree.json")) == tree
    assert json.loads((tmp_path / "tree.json").read_text())["fitted_on"] == {"answers": 3}
    assert parse("4,3,16") == DynamicTree(4, 3, 16)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "object"),
        ('{"paths": [[0]], "path": 1}', "unknown key 'path'"),
        ('{"paths": [0]}', "list of lists"),
        ("{}", "list of lists"),
        ('{"paths": [[0], [1, 0]]}', r"needs the path \[1\]"),
        ('{"paths": [["a"]]}', "whole numbers"),
        ('{"paths": [[[]]]}', "tree.json"),
        ('{"paths": []}', "at least one"),
    ],
)
def test_a_file_that_is_no_tree_is_refused(tmp_path, content, reason):
    (tmp_path / "tree.json").write_text(content)
    with pytest.raises(InputError, match=reason):
        load(tmp_path / "tree.json")


@pytest.mark.parametrize("text", ["4,3", "4", "1,3,3", "2,2,9", "none.json"])
def test_a_tree_that_cannot_be_is_refused(text):
    with pytest.raises(InputError, match=text):
        parse(text)


def test_a_map_that_is_too_small_is_refused():
    check_fits(DynamicTree(4, 3, 16), "4,3,16", 4, "the map")
    with pytest.raises(InputError, match="up to 4 drafts, and the map has 3 ids"):
        check_fits(DynamicTree(4, 3, 16), "4,3,16", 3, "the map")
