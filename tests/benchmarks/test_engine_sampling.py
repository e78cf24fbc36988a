"""The test of a server's sampling passes equal distributions, finds others, and must find a planted error."""

import os
import random
from importlib import metadata

import pytest

from benchmarks.engines.sampling import ALPHA, PLANTED, compare, judge, plant

WEIGHTS = [50, 20, 10, 8, 5, 3, 2, 1, 0.5, 0.5]


def drawn(weights, seed, count=2000):
    return random.Random(seed).choices(range(len(weights)), weights, k=count)


def test_equal_distributions_pass_and_others_do_not():
    one = drawn(WEIGHTS, 1)
    same = compare(one, drawn(WEIGHTS, 2))
    assert same.p > 0.01 and sum(a for a, _ in same.counts.values()) == 2000
    favoured = [60, *WEIGHTS[1:]]  # a bit more for the likeliest token
    assert compare(one, drawn(favoured, 3)).p < ALPHA


def test_rare_tokens_share_a_column():
    test = compare([0] * 50 + [1] * 50 + list(range(2, 12)), [0] * 50 + [1] * 50 + list(range(12, 22)))
    assert test.freedom == 2 and test.p == pytest.approx(1.0) and len(test.counts) == 22
    assert compare([7] * 20, [7] * 20).p == 1.0


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
