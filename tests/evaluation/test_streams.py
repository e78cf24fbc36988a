"""Several cards, several requests at a time, sampling: who is asked what, and what is compared."""

import asyncio

import pytest
from helpers.stand_in import StandIn

from evaluation import cards, metrics, streams
from evaluation.arguments import levels
from evaluation.arms import Arm, parse_arms
from evaluation.asking import Settings
from evaluation.backends import Server
from evaluation.table import facts
from fastmtp.cli import InputError


def arm(name, num_steps=0, card=0):
    return Arm(name, "m", num_steps, None, card=card)


def test_arms_go_to_the_cards_in_turn_and_each_card_measures_the_baseline():
    arms = [arm("baseline"), *(arm(f"fastmtp:{k}", k) for k in (1, 2, 3))]
    spread = cards.spread(arms, 2)
    assert [(a.name, a.card) for a in spread] == [
        ("baseline", 0),
        ("baseline_gpu1", 1),
        ("fastmtp:1", 0),
        ("fastmtp:2", 1),
        ("fastmtp:3", 0),
    ]
    assert [[a.name for (a,) in group] for group in cards.rounds([(a,) for a in spread], 2)] == [
        ["baseline", "baseline_gpu1"],
        ["fastmtp:1", "fastmtp:2"],
        ["fastmtp:3"],
    ]
    assert cards.spread(arms, 1) == arms
    assert [a.name for a in cards.spread(arms[:2], 4)] == ["baseline", "fastmtp:1"]  # three cards stay idle


def test_cards_are_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,7")
    assert cards.chosen(2) == ["4", "6"] and cards.chosen(1) == []
    with pytest.raises(InputError, match="--gpus 4: this machine shows 3"):
        cards.chosen(4)


def test_sampled_arms():
    (one,) = parse_arms("fastmtp:3@sampled", "m", None, [])
    assert (one.name, one.num_steps, one.sampled) == ("fastmtp:3@sampled", 3, True)
    with pytest.raises(InputError, match="plain decoding has no drafts"):
        parse_arms("baseline@sampled", "m", None, [])


def test_arms_whose_steps_change():
    (one,) = parse_arms("fastmtp:7@adaptive", "m", None, [])
    assert (one.name, one.num_steps, one.adaptive, one.sampled) == ("fastmtp:7@adaptive", 7, True, False)
    for name in ("fastmtp:3@adaptive", "fastmtp:7@tree4x16@adaptive"):
        with pytest.raises(InputError, match="chains of up to 7 steps; give fastmtp:7@adaptive"):
            parse_arms(name, "m", None, [])
    with pytest.raises(InputError, match="plain decoding has no drafts; leave @adaptive out"):
        parse_arms("baseline@adaptive", "m", None, [])


def test_each_question_has_a_seed_that_arms_share():
    settings = Settings(temperature=0.6, seed=5, top_k=20, top_p=0.95)
    one, other = settings.sampling("00000001ab"), settings.sampling("00000002ab")
    assert one == {"temperature": 0.6, "seed": 6, "top_k": 20, "top_p": 0.95} and other["seed"] == 7
    # Greedy answers depend on none of it: kept ones stay good.
    assert Settings(top_k=20).facts() == Settings().facts() and "top_k" in settings.facts()


def turn(started, latency, tokens):
    return {"started": started, "latency_s": latency, "output_ids": [1] * tokens}


def test_throughput_counts_only_the_time_in_which_all_streams_were_busy():
    # Two streams at 10 tokens per second each; then one is alone, at whatever speed.
    turns = [turn(0, 10, 100), turn(0, 20, 200), turn(10, 10, 100), turn(20, 5, 50), turn(20, 500, 5000)]
    assert metrics.steady_throughput(turns, 2) == pytest.approx(20)
    alone = [turn(0, 1, 30), turn(1, 1, 10), turn(2, 2, 20)]
    assert metrics.steady_throughput(alone, 1) == pytest.approx(60 / 4)
    assert metrics.steady_throughput(turns[:1], 2) is None


@pytest.mark.parametrize("text, expected", [("", []), ("8,1, 8", [1, 8])])
def test_levels(text, expected):
    assert levels(text) == expected


@pytest.mark.parametrize("text", ["0,8", "eight", "1;8", "-1"])
def test_levels_that_are_none(text):
    with pytest.raises(InputError, match="expected numbers of requests"):
        levels(text)


def test_a_level_keeps_as_many_requests_in_flight_as_it_says():
    class Counting:
        now = most = 0

        async def ask(self, ids, tokens, **_):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.001)
            self.now -= 1
            return ids

    backend = Counting()
    answers = asyncio.run(streams._together(backend, [([n], {}) for n in range(40)], 8, 5))
    assert len(answers) == 40 and backend.most == 8


def test_sampling_reaches_sglang():
    async def run(stand_in):
        async with Server(stand_in.url) as server:
            await server.ask(
                [1, 2], 4, **Settings(temperature=0.6, top_k=20, top_p=0.95).sampling("00000001")
            )
            await server.ask([1, 2], 4, **Settings(temperature=0.6).sampling("00000001"))

    with StandIn() as stand_in:
        asyncio.run(run(stand_in))
        first, second = (body["sampling_params"] for body in stand_in.bodies)
    assert (first["temperature"], first["top_k"], first["top_p"], first["sampling_seed"]) == (
        0.6,
        20,
        0.95,
        1,
    )
    assert (second["top_k"], second["top_p"]) == (-1, 1.0)


def row(arm, level, speedup, **more):
    return {"arm": arm, "streams": level, "throughput": 100.0 * level, "speedup": speedup} | (
        {"accept_length": 2.0, "requests": 16, "questions": 16} | more
    )


def test_the_crossover_is_named():
    rows = [row("baseline", n, 1.0) for n in (1, 8)]
    assert "pays at every level, with 8 requests at a time by 1.20x" in streams.markdown(
        [*rows, row("fastmtp:3", 1, 1.5), row("fastmtp:3", 8, 1.2)]
    )
    text = streams.markdown([*rows, row("fastmtp:3", 1, 1.5), row("fastmtp:3", 8, 0.9, requests=32)])
    assert "pays with 1 requests at a time, not with 8" in text and "32 requests asked 16 questions" in text
    assert "| fastmtp:3 | 100, 1.50x (2.00) | 800, 0.90x (2.00) |" in text


def test_simulated_figures_say_so():
    line = {"model": "models/x", "temperature": 0.0, "config": {"fingerprint": {}}}
    assert "Simulated: nothing." in facts(line)[0] and "the weights of x" in facts(line)[0]
    line["config"] = {"fingerprint": {"--load-format": "dummy", "SGLANG_SIMULATE_ACC_LEN": "2.7"}}
    assert facts(line)[0].startswith("Simulated: the weights (random); the accept length")
    line |= {"temperature": 0.6, "config": {"fingerprint": {"top_k": 20, "top_p": 0.95}}}
    assert "temperature 0.6, top-k 20, top-p 0.95: same distribution, not the same text" in facts(line)[1]
