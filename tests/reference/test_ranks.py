"""Accept length of trees without decoding is what decoding with them counts."""

import pytest
import torch
from helpers.tiny import samples_of

from fastmtp.reference.ranks import measure_drafted, measure_ranks, rank, text_ranks
from fastmtp.reference.speculative import generate
from fastmtp.reference.teacher_forced import FULL, draft_tables, measure, pooled
from fastmtp.tau import Acceptance
from fastmtp.trees.fit import MISS, acceptance, fit, halves
from fastmtp.trees.tree import DynamicTree, StaticTree

WIDE = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0)))


def decoded(useful, samples, tree, token_map=None) -> Acceptance:
    total = Acceptance()
    for sample in samples:
        result = generate(
            useful.model, sample["prompt_ids"], len(sample["output_ids"]), tree, token_map=token_map
        )
        assert result.ids == sample["output_ids"]
        total.add(len(result.ids), result.histogram)
    return total


@pytest.mark.parametrize("batch_tokens", [1, 200])
def test_static_trees_from_one_pass_count_as_decoded(useful, batch_tokens):
    samples = samples_of(useful)
    ranks = measure_ranks(useful.model, samples, 4, {"map": useful.token_map}, batch_tokens)
    for name, token_map in ((FULL, None), ("map", useful.token_map)):
        trees = [WIDE, StaticTree.chain(4), fit(ranks[name], 12, 4)]
        for tree in trees:
            assert acceptance(tree, ranks[name]) == decoded(useful, samples, tree, token_map)
        chain, fitted = (acceptance(tree, ranks[name]).accept_length for tree in trees[1:])
        assert fitted > chain, "the tree is of no use here: the test has lost its point"


def test_a_chain_counts_as_the_chains_own_measure(useful):
    samples = samples_of(useful)
    ranks = measure_ranks(useful.model, samples, 3, {"map": useful.token_map})
    results = measure(useful.model, samples, 3, {"map": useful.token_map})
    for name in (FULL, "map"):
        assert acceptance(StaticTree.chain(3), ranks[name]).histogram == pooled(results, name).histogram


@pytest.mark.parametrize("tree", [DynamicTree(3, 3, 12), DynamicTree(4, 2, 6), WIDE], ids=str)
def test_trees_drafted_along_the_text_count_as_decoded(useful, tree):
    samples = samples_of(useful)
    histograms = measure_drafted(useful.model, samples, tree, {"map": useful.token_map})
    for name, token_map in ((FULL, None), ("map", useful.token_map)):
        total = Acceptance()
        for sample, histogram in zip(samples, histograms[name], strict=True):
            total.add(len(sample["output_ids"]), histogram)
        assert total == decoded(useful, samples, tree, token_map)


def test_ranks_are_places_in_the_sorted_drafts(useful):
    prompt, answer = useful.prompts[1], useful.answers[1][:9]
    token_map, net = useful.token_map, useful.model.net
    (tables,) = draft_tables(useful.model, [(prompt, answer)], 3, {FULL: None, "map": token_map}, text_ranks)
    text = prompt + answer
    _, states, _ = net.mtp_states(torch.tensor([text]), num_steps=3, attention="exact")
    everything = torch.arange(net.vocab_size)
    for name, ids in ((FULL, everything), ("map", token_map)):
        assert tables[name].shape == (8, 3)
        for i in range(8):
            for k in range(3):
                anchor = len(prompt) - 1 + i
                target = text[anchor + k + 2] if anchor + k + 2 < len(text) else None
                logits = net.lm_head(states[k][0, anchor])[ids]
                order = ids[logits.argsort(descending=True, stable=True)].tolist()
                expected = order.index(target) if target in order else MISS
                assert tables[name][i, k] == expected
    assert (tables["map"] == MISS).any() and (tables[FULL] != MISS).any()


def test_of_equal_logits_the_lower_row_is_first():
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    ranks = rank(torch.ones(4, 1), weight, torch.arange(4))
    assert ranks.tolist() == [2, 0, 1, 3]


def test_halves_share_nothing():
    assert halves([1, 2, 3, 4, 5]) == ([1, 3, 5], [2, 4])
