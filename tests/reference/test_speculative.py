"""The reference decoder loses nothing: greedy token for token, sampled in distribution; it counts right."""

import pytest
import torch
from helpers.chi_square import assert_fits, p_value
from helpers.table_net import TableNet
from helpers.tiny import tiny_model, wrap

from fastmtp.reference.speculative import accept_sampled, generate

MAP = torch.arange(0, 97, 3)
PROMPT = [5, 17, 3, 88, 41]


@pytest.fixture(scope="module")
def nets():
    """Random networks: most drafts are wrong, and many a greedy text ends in a loop, where some are right."""
    return [tiny_model(seed, spread=0.2) for seed in (0, 1)]


def plain_greedy(net, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """The whole text through the network for each token: no cache, no code of the decoder."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count and not (len(ids) > len(prompt) and ids[-1] in ends):
            ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def check_counts(result, num_steps: int) -> None:
    """Each pass keeps its accepted drafts and one more token, but the last, which may be cut; the first token
    is free.
    """
    assert sum(result.histogram) == result.verify_passes and len(result.histogram) == num_steps + 1
    assert result.histogram == [result.accepted.count(drafts) for drafts in range(num_steps + 1)]
    most = 1 + sum((j + 1) * passes for j, passes in enumerate(result.histogram))
    assert most - 1 <= len(result.ids) <= most


@pytest.mark.parametrize("token_map", [None, MAP], ids=["full", "map"])
@pytest.mark.parametrize("num_steps", range(1, 8))
def test_greedy_is_plain_greedy(nets, num_steps, token_map):
    for net in nets:
        expected = plain_greedy(net, PROMPT, 24, set())
        result = generate(wrap(net), PROMPT, 24, num_steps, token_map=token_map)
        assert result.ids == expected
        check_counts(result, num_steps)


def test_zero_steps_is_plain_decoding(nets):
    result = generate(wrap(nets[0]), PROMPT, 10, 0)
    assert result.ids == plain_greedy(nets[0], PROMPT, 10, set())
    assert result.verify_passes == 9 and result.histogram == [9]


def test_useful_drafts_save_passes_and_change_nothing(useful):
    """The same with a head that is often right, so that long accepted prefixes are exercised too."""
    for prompt in useful.prompts[:4]:
        for num_steps in (1, 3, 5):
            result = generate(useful.model, prompt, 30, num_steps)
            assert result.ids == plain_greedy(useful.model.net, prompt, 30, set())
            assert result.verify_passes < 27
            check_counts(result, num_steps)


def test_accepted_drafts_are_listed_in_the_order_of_the_passes(useful):
    """Decoded anew from where a pass began, the first pass accepts as many drafts."""
    prompt = useful.prompts[0]
    whole = generate(useful.model, prompt, 30, 3)
    assert len(set(whole.accepted)) > 1, "the test has lost its point"
    for turn, accepted in enumerate(whole.accepted[:-1]):
        text = prompt + whole.ids[: turn + sum(whole.accepted[:turn])]
        assert generate(useful.model, text, 5, 3).accepted[0] == accepted


@pytest.mark.parametrize("count", range(1, 9))
def test_the_limit_cuts_a_cycle(useful, count):
    prompt = useful.prompts[0]
    result = generate(useful.model, prompt, count, 3)
    assert result.ids == plain_greedy(useful.model.net, prompt, count, set()) and len(result.ids) == count
    check_counts(result, 3)


@pytest.mark.parametrize("token_map", [None, "map"], ids=["full", "map"])
def test_an_end_token_stops_inside_accepted_drafts(useful, token_map):
    """Every token of a text in turn is made the end token: as last of a cycle, as a draft, as the first
    token.
    """
    token_map = useful.token_map if token_map else None
    inside = 0
    for prompt in useful.prompts[:3]:
        text = plain_greedy(useful.model.net, prompt, 16, set())
        for end in set(text):
            result = generate(useful.model, prompt, 16, 3, eos_ids={end}, token_map=token_map)
            assert result.ids == text[: text.index(end) + 1]
            check_counts(result, 3)
            inside += len(result.ids) == sum((j + 1) * n for j, n in enumerate(result.histogram))
    assert inside > 0, "no end token was an accepted draft: the test has lost its point"


def test_a_prompt_of_one_token(nets):
    assert generate(wrap(nets[0]), [7], 12, 3).ids == plain_greedy(nets[0], [7], 12, set())


# Sampling


@pytest.mark.parametrize("mapped", [False, True], ids=["full", "map"])
def test_accepted_tokens_are_distributed_as_the_model(mapped):
    """20,000 draws of two drafts against fixed distributions: the three kept tokens are as three draws from
    p.
    """
    generator = torch.Generator().manual_seed(0)
    p = (torch.randn(3, 6, generator=generator) * 1.5).softmax(-1)
    q = (torch.randn(2, 6, generator=generator) * 1.5).softmax(-1)
    if mapped:
        q[:, [0, 3, 5]] = 0
        q /= q.sum(-1, keepdim=True)
    counts = torch.zeros(6, 6, 6)
    draws = 20_000
    for first, second in torch.stack(
        [row.multinomial(draws, True, generator=generator) for row in q], 1
    ).tolist():
        accepted, extra = accept_sampled([first, second], q, p, generator)
        kept = [first, second][:accepted] + [extra]
        kept += [int(row.multinomial(1, generator=generator)) for row in p[len(kept) :]]
        counts[tuple(kept)] += 1
    assert_fits(counts, draws * p[0][:, None, None] * p[1][None, :, None] * p[2][None, None, :])


@pytest.mark.parametrize("mapped", [False, True], ids=["full", "map"])
def test_sampled_texts_are_distributed_as_the_model(mapped, monkeypatch):
    """Joint chi-square over the first three tokens of texts decoded with drafts, every seed another text."""
    net = TableNet()
    net.without_cache(monkeypatch)
    token_map = torch.tensor([1, 3]) if mapped else None
    counts, draws = torch.zeros(4, 4, 4), 20_000
    model = wrap(net)
    for seed in range(draws):
        counts[tuple(generate(model, [0, 2], 3, 2, temperature=1.0, seed=seed, token_map=token_map).ids)] += 1
    expected = net.p[2][:, None, None] * net.p[:, :, None] * net.p[None]
    assert_fits(counts, draws * expected)


@pytest.mark.parametrize("mapped", [False, True], ids=["full", "map"])
def test_sampled_texts_of_a_real_network_fit_it(mapped):
    """Rank every sampled token among the network's own probabilities, likeliest draft first: uniform if
    lossless.

    The order by the head's distribution makes the test keen on what goes wrong in practice, favour for the
    draft.
    """
    small = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    net = tiny_model(4, spread=0.4, vocab_size=24, **small)
    token_map = torch.arange(0, 24, 2) if mapped else None
    prompt, bins, ranks = [1, 2, 3], 10, []
    noise = torch.Generator().manual_seed(1)
    for seed in range(16):
        text = (
            prompt + generate(wrap(net), prompt, 100, 2, temperature=1.0, seed=seed, token_map=token_map).ids
        )
        ids = torch.tensor([text])
        with torch.no_grad():
            p = net(input_ids=ids).logits[0].softmax(-1)
            q = net.lm_head(net.mtp_states(ids, num_steps=1)[1][0])[0]
        for at in range(len(prompt) + 1, len(text)):
            order = q[at - 2].argsort(descending=True)
            mass = p[at - 1][order]
            place = int((order == text[at]).nonzero())
            ranks.append(float(mass[:place].sum() + mass[place] * torch.rand((), generator=noise)))
    counts = torch.histc(torch.tensor(ranks), bins, 0, 1)
    assert_fits(counts, torch.full((bins,), len(ranks) / bins))


def test_temperature_sharpens_and_the_seed_repeats():
    net = tiny_model(2, spread=0.2)
    same = [generate(wrap(net), PROMPT, 12, 3, temperature=1.0, seed=7).ids for _ in range(2)]
    assert same[0] == same[1] != generate(wrap(net), PROMPT, 12, 3, temperature=1.0, seed=8).ids
    assert generate(wrap(net), PROMPT, 12, 3, temperature=1e-4).ids == plain_greedy(net, PROMPT, 12, set())


def test_a_draft_the_model_never_says_is_refused_even_where_rounding_leaves_no_residual():
    """p and q both round to one at token 0; q still drew token 1, about which p has nothing to say."""
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 1e-9]])
    assert accept_sampled([1], q, p, torch.Generator().manual_seed(0)) == (0, 0)


def test_the_chi_square_helper_can_fail():
    expected = torch.full((10,), 100.0)
    assert_fits(expected + torch.tensor([5.0, -5.0] * 5), expected)
    with pytest.raises(AssertionError):
        assert_fits(expected + torch.tensor([25.0, -25.0] * 5), expected)
    assert p_value(21.666, 9) == pytest.approx(0.01, rel=1e-3)  # from a printed table
