"""Decoding with trees loses nothing, and each node sees what it would see in a chain of its own."""

import pytest
import torch
from helpers.chi_square import assert_fits
from helpers.table_net import TableNet
from helpers.tiny import tiny_model, wrap

from fastmtp.reference import speculative
from fastmtp.reference.speculative import Backbone, Choice, Drafter, generate
from fastmtp.trees.tree import DynamicTree, StaticTree, mask

WIDE = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0)))
TREES = [WIDE, StaticTree(((0,), (3,))), DynamicTree(3, 3, 12), DynamicTree(2, 4, 6), DynamicTree(4, 1, 4)]
PROMPT = [5, 17, 3, 88, 41]
MAP = torch.arange(0, 97, 3)


def path_of(drawing, node: int) -> list[int]:
    """Nodes from the root's child to `node`."""
    return [*path_of(drawing, drawing.parents[node]), node] if node else []


def drafted(net, tree, token_map=None):
    """(drawing, backbone, drafter, state, text) after a prompt and one token."""
    text = [*PROMPT, 7]
    backbone, drafter = Backbone(net), Drafter(net, 100, token_map)
    states, _ = backbone.forward(text[:-1], 0, 1)
    state = drafter.step(states, torch.tensor([text[1:]]), 0)
    return drafter.draw(tree, state, len(text) - 2, text[-1]), backbone, drafter, state, text


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_verified_logits_are_those_of_each_path_alone(tree):
    """The slow decoder: every path from the root as a text of its own, without a cache."""
    net = tiny_model(0)
    with torch.inference_mode():
        drawing, backbone, _, _, text = drafted(net, tree)
        states, logits = backbone.forward(drawing.tokens, len(PROMPT), tree.nodes, drawing.parents)
        for node in range(tree.nodes):
            path = text + [drawing.tokens[n] for n in path_of(drawing, node)]
            alone = net(input_ids=torch.tensor([path])).logits[0, -1]
            torch.testing.assert_close(logits[node], alone, rtol=1e-4, atol=1e-4)


def test_a_visible_sibling_is_noticed(monkeypatch):
    """The planted error: the mask of a chain, in which each node sees all before it."""
    monkeypatch.setattr(
        speculative, "mask", lambda parents: torch.ones(len(parents), len(parents)).tril().bool()
    )
    with pytest.raises(AssertionError, match="not close"):
        test_verified_logits_are_those_of_each_path_alone(WIDE)


@pytest.mark.parametrize("token_map", [None, MAP], ids=["full", "map"])
@pytest.mark.parametrize("tree", [WIDE, DynamicTree(3, 3, 12)], ids=str)
def test_a_node_drafts_as_at_the_end_of_its_own_chain(tree, token_map):
    """Every node with children: a fresh chain along its path drafts exactly these children."""
    net = tiny_model(1)
    with torch.inference_mode():
        drawing, _, _, _, _ = drafted(net, tree, token_map)
        children = {}
        for node, parent in enumerate(drawing.parents[1:], start=1):
            children.setdefault(parent, []).append(drawing.tokens[node])
        assert len(children) > 3
        for node, tokens in children.items():
            _, _, drafter, state, text = drafted(net, StaticTree.chain(1), token_map)
            for step, here in enumerate(path_of(drawing, node)):
                token = torch.tensor([[drawing.tokens[here]]])
                state = drafter.step(state, token, len(text) - 1 + step)
            logits = torch.nn.functional.linear(state[0, -1], drafter.weight)
            order = logits.argsort(descending=True)
            order = order if token_map is None else token_map[order]
            places = [order.tolist().index(token) for token in tokens]
            assert max(places) < tree.topk and places == sorted(places)


def test_the_cache_holds_the_accepted_path_alone():
    net = tiny_model(2)
    with torch.inference_mode():
        drawing, backbone, _, _, text = drafted(net, WIDE)
        backbone.forward(drawing.tokens, len(PROMPT), WIDE.nodes, drawing.parents)
        path = [2, 6, 9]  # ranks 1, 0, 0: with gaps
        assert path_of(drawing, 9) == path
        backbone.keep([0, *path], WIDE.nodes)
        kept = text + [drawing.tokens[node] for node in path]
        fresh = Backbone(net)
        fresh.forward(kept, 0, 1)
        for layer, other in zip(backbone.cache.layers, fresh.cache.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mapped", [False, True], ids=["full", "map"])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_greedy_is_plain_greedy(useful, tree, mapped):
    """Over all prompts, a random head's and a useful one's; the limit and an end token cut in the middle."""
    token_map = useful.token_map if mapped else None
    accepted = 0
    for prompt, answer in zip(useful.prompts, useful.answers, strict=True):
        result = generate(useful.model, prompt, 37, tree, token_map=token_map)
        assert result.ids == answer[:37]
        accepted += sum(j * passes for j, passes in enumerate(result.histogram))
        end = answer[20]
        cut = generate(useful.model, prompt, 37, tree, token_map=token_map, eos_ids={end})
        assert cut.ids == answer[: answer.index(end) + 1]
    assert accepted > 30, "no draft is accepted here: the test has lost its point"
    net = tiny_model(0, spread=0.2)
    plain = generate(wrap(net), PROMPT, 24, 0).ids
    assert generate(wrap(net), PROMPT, 24, tree, token_map=MAP if mapped else None).ids == plain


@pytest.mark.parametrize("mapped", [False, True], ids=["full", "map"])
def test_a_tree_of_width_one_is_the_chain(useful, mapped):
    """Token for token and pass for pass."""
    token_map = useful.token_map if mapped else None
    for prompt in useful.prompts:
        for steps in (1, 2, 5):
            chain = generate(useful.model, prompt, 30, steps, token_map=token_map)
            for tree in (StaticTree.chain(steps), DynamicTree(1, steps, steps + 1)):
                same = generate(useful.model, prompt, 30, tree, token_map=token_map)
                assert (same.ids, same.histogram) == (chain.ids, chain.histogram)


def sampled_texts_fit(tree, token_map, monkeypatch, draws: int = 4_000) -> None:
    """Joint chi-square over the first three tokens of `draws` texts."""
    net, counts = TableNet(), torch.zeros(4, 4, 4)
    net.without_cache(monkeypatch)
    for seed in range(draws):
        counts[tuple(generate(wrap(net), [0, 2], 3, tree, 1.0, seed, token_map).ids)] += 1
    assert_fits(counts, draws * net.p[2][:, None, None] * net.p[:, :, None] * net.p[None])


SMALL = StaticTree(((0,), (1,), (0, 0), (1, 1)))


@pytest.mark.parametrize(
    ("tree", "token_map"), [(SMALL, None), (DynamicTree(2, 2, 5), torch.tensor([1, 3]))], ids=["full", "map"]
)
def test_sampled_texts_are_distributed_as_the_model(tree, token_map, monkeypatch):
    sampled_texts_fit(tree, token_map, monkeypatch)


def test_favour_for_the_draft_is_noticed(monkeypatch):
    """The planted error: a draft is kept if the backbone finds it likely, whatever was drawn."""

    def biased(self, drawing, q, logits):
        likely = bool(self.probabilities(logits[0])[drawing.tokens[1]] > 0.2)
        return ([1] if likely else []), int(self.pick(logits[int(likely)])[0])

    monkeypatch.setattr(Choice, "verify", biased)
    with pytest.raises(AssertionError):
        sampled_texts_fit(SMALL, None, monkeypatch, draws=1_000)


def test_the_mask_of_a_drawing_is_its_ancestors():
    with torch.inference_mode():
        drawing, *_ = drafted(tiny_model(3), DynamicTree(3, 3, 12))
    for node, row in enumerate(mask(drawing.parents)):
        assert row.nonzero().flatten().tolist() == sorted([0, *path_of(drawing, node)])
