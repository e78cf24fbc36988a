"""The test of a server's sampling passes equal distributions, finds others, and must find a planted error."""

import os
import random
from importlib import metadata
from types import SimpleNamespace

import pytest

from benchmarks.engines import sampling_arms
from benchmarks.engines.chi_square import ALPHA, compare, compare_answers
from benchmarks.engines.sampling import judge
from benchmarks.engines.sampling_arms import ARMS, PLANTED, plant
from fastmtp.engines import sglang

WEIGHTS = [50, 20, 10, 8, 5, 3, 2, 1, 0.5, 0.5]


def drawn(weights, seed, count=2000):
    return random.Random(seed).choices(range(len(weights)), weights, k=count)


def test_equal_distributions_pass_and_others_do_not():
    one = drawn(WEIGHTS, 1)
    same = compare(one, drawn(WEIGHTS, 2))
    assert same.p > 0.01 and same.outcomes == 10
    favoured = [65, *WEIGHTS[1:]]  # a bit more for the likeliest token
    assert compare(one, drawn(favoured, 3)).p < ALPHA


def test_rare_tokens_share_a_column():
    test = compare([0] * 50 + [1] * 50 + list(range(2, 12)), [0] * 50 + [1] * 50 + list(range(12, 22)))
    assert test.freedom == 2 and test.p == pytest.approx(1.0) and test.outcomes == 22
    assert compare([7] * 20, [7] * 20).p == 1.0


def test_pairs_see_tokens_that_do_not_fit_the_one_before():
    plain = [(first, first) for first in drawn([1, 1], 1)]  # the second token repeats the first
    wrong = list(zip(drawn([1, 1], 2), drawn([1, 1], 3), strict=True))
    tests = {test.tokens: test.p for test in compare_answers(plain, wrong)}
    assert tests.keys() == {"1", "2", "1 and 2"}
    assert tests["1"] > 0.01 and tests["2"] > 0.01 and tests["1 and 2"] < ALPHA


def rows(planted: float, others: float) -> list[dict]:
    return [
        {"arm": arm, "temperature": temperature, "p": p}
        for temperature in (0.6, 1.0)
        for arm, p in (("greedy drafts", others), (PLANTED, planted), (PLANTED, 0.4))
    ]


def test_the_planted_error_must_be_caught_at_every_temperature():
    assert judge(rows(1e-9, 0.03))[0]
    assert not judge(rows(0.02, 0.03))[0]  # not caught
    assert not judge(rows(1e-9, 1e-5))[0]  # sampling differs
    half = [row | {"p": 0.5} if row["temperature"] == 1.0 else row for row in rows(1e-9, 0.03)]
    assert not judge(half)[0]


def test_the_planted_error_is_a_plugin_that_vllm_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    path = plant(tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert path == [str(tmp_path), "/elsewhere"]
    monkeypatch.syspath_prepend(tmp_path)
    (point,) = metadata.distribution("accept-all").entry_points
    assert callable(point.load()) and (point.group, point.value) == (
        "vllm.general_plugins",
        "accept_all:register",
    )


def test_sglang_is_started_for_each_way_of_drafting(tmp_path, monkeypatch):
    lines = {}
    monkeypatch.setattr(sglang, "sglang_version", lambda: "0.5.17")
    monkeypatch.setattr(
        sglang,
        "command",
        lambda s: [str(s.num_steps), str(s.token_map), *map(str, s.flags), *["sampled"] * s.sampled],
    )
    monkeypatch.setattr(sglang, "vocab_environment", lambda *_: {"FASTMTP_DRAFT_VOCAB": "map.pt"})
    args = SimpleNamespace(num_steps=3, token_map="en.pt", model="m", flags=[])
    engine = sampling_arms.SGLang()
    for number, arm in enumerate(ARMS):
        server, ready = engine.server(args, arm, number, 31000, tmp_path / "log", tmp_path)
        lines[arm.name] = server.argv
        ours = arm.name == "sampled drafts, map"
        assert ready == ([sglang.VOCAB_READY] if ours else [])
        assert (server.env.get("FASTMTP_DRAFT_VOCAB") == "map.pt") == ours
        assert ("sampled" in server.argv) == arm.name.startswith("sampled")
        assert (server.argv[-4:] == sampling_arms.ACCEPT_ANY) == (arm.name == PLANTED)
    assert lines["plain"][:2] == ["0", "None"] and lines["greedy drafts, map"][:2] == ["3", "en.pt"]
    assert lines["sampled drafts, map"][:2] == ["3", "None"]  # SGLang's own map cannot
    seeds = [line[line.index("--random-seed") + 1] for line in lines.values()]
    assert len(set(seeds)) == len(ARMS)  # else two servers draw the same numbers
