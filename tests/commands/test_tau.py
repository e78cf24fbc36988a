"""Accept length and its rates: by hand, and unknown instead of a number if nothing was verified."""

import json

import pytest
import torch

from fastmtp.tau import (
    Acceptance,
    accept_length,
    bootstrap,
    bounds,
    position_rates,
    ratio,
    resample,
    walk,
)


def test_by_hand():
    assert accept_length(30, 12) == 2.5
    assert position_rates([5, 3, 2]) == [0.5, 0.2]
    assert position_rates([4]) == []


def test_nothing_verified_is_unknown_and_not_a_number():
    assert accept_length(3, 0) is None and position_rates([0, 0, 0]) is None and position_rates([]) is None
    empty, single = Acceptance(), Acceptance()
    single.add(1, [0, 0, 0])  # an answer of one token: the prefill gave it
    for part in (empty, single):
        assert part.accept_length is None and part.position_rates is None and part.interval is None
    merged = Acceptance()
    merged.merge(single)
    assert merged.accept_length is None


def test_draws_without_a_pass_are_left_out_of_the_interval():
    part = Acceptance()
    part.add(1, [0, 0])
    part.add(20, [4, 8])
    low, high = part.interval
    assert 20 / 12 <= low <= high <= 21 / 12 + 1e-9
    assert "NaN" not in json.dumps(part.interval)
    assert bounds(torch.tensor([torch.nan, torch.inf])) is None


def test_resampled_sums_pair_two_arms():
    rows = [(n + 1.0, 2.0 * (n + 1), 5.0) for n in range(30)]
    sums = resample(rows, 50)
    assert sums.shape == (50, 3) and torch.equal(2 * sums[:, 0], sums[:, 1])
    assert (sums[:, 2] == 150).all() and len(sums[:, 0].unique()) > 40
    assert torch.equal(resample(rows, 50), sums)


def test_the_interval_is_that_of_resampled_answers():
    """Equal answers leave no doubt; of two kinds, tau lies between theirs; two heads are drawn alike."""
    same, mixed = Acceptance(), Acceptance()
    for i in range(40):
        same.add(20, [4, 8])
        mixed.add(20, [4, 8] if i % 2 else [18, 1])
    assert same.interval == pytest.approx((20 / 12, 20 / 12))
    low, high = mixed.interval
    assert 20 / 19 < low < mixed.accept_length < high < 20 / 12
    doubled = bootstrap([(2 * tokens, passes) for tokens, passes in mixed.samples])
    assert torch.equal(doubled, 2 * bootstrap(mixed.samples))


def test_walk_by_hand():
    yes, no = True, False
    hits = torch.tensor([[yes, yes], [no, yes], [yes, no], [no, no], [yes, no]])
    # six tokens: pass 1 keeps 2 drafts + 1, pass 2 (row 3) keeps 1, pass 3 (row 4) has place for one draft
    assert walk(hits) == [1, 1, 1]
    assert walk(torch.zeros(4, 3, dtype=torch.bool)) == [4, 0, 0, 0]
    assert walk(torch.zeros(0, 2, dtype=torch.bool)) == [0, 0, 0]


def test_the_ratio_of_two_heads_is_paired():
    """Answers differ more than heads do, but a head that needs a tenth fewer passes on every answer has a
    narrow ratio.
    """
    answers = [(100 * n, 50 * n * (1 + n % 3)) for n in range(1, 30)]
    first, second = Acceptance(), Acceptance()
    for tokens, passes in answers:
        first.add(tokens, [passes])
        second.add(tokens, [passes * 9 // 10])
    assert first.interval[1] / first.interval[0] > 1.2
    assert ratio(second, first) == pytest.approx((10 / 9, 10 / 9, 10 / 9))
    assert ratio(first, first) == pytest.approx((1, 1, 1))
    empty = Acceptance(samples=[(1, 0)] * len(answers))
    assert ratio(empty, first) is None and ratio(first, empty) is None
    with pytest.raises(ValueError, match="0 and 29 answers"):
        ratio(Acceptance(), first)
