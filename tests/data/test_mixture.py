"""The data list and its mix: shares reached, the seed alone decides, lists that contradict themselves."""

import json
import random
from pathlib import Path

import pytest
from helpers.curating import line, prompts, run

from fastmtp.cli import InputError
from fastmtp.data.clean_set import CurateConfig
from fastmtp.data.mixture import choose
from fastmtp.data.sources import DataConfig
from fastmtp.formats.yaml_file import load_yaml

ROOT = Path(__file__).resolve().parents[2]
PAPER = {"general": 0.42, "math": 0.18, "code": 0.13, "chinese": 0.27}


def data_list(tmp_path, shares, change=None):
    """A data list of two sources per category, with the keys of `change` in place of its own."""
    path = tmp_path / "data.yaml"
    sources = [
        {"name": f"{name}_{n}", "category": name, "licence": "none", "path": "x.jsonl", "prompt": "prompt"}
        for name in shares
        for n in range(2)
    ]
    path.write_text(json.dumps({"shares": shares, "sources": sources} | (change or {})))
    return path


def test_mix_reaches_the_shares_and_depends_on_the_seed_alone(tmp_path):
    rng = random.Random(0)
    rows = [line(n, f"{name}_{n % 2}", length=rng.randint(20, 60)) for name in PAPER for n in range(250)]
    data = data_list(tmp_path, PAPER)
    train, held, counts = run(tmp_path, rows, "--data", data, "--eval-share", 0.1)
    for name, share in PAPER.items():
        assert counts["categories"][name]["target_share"] == share
        assert counts["categories"][name]["reached_share"] == pytest.approx(share, abs=0.005)
    biggest = counts["categories"]["general"]
    assert biggest["available_tokens"] - biggest["tokens"] < 61, "the scarcest category is used up"
    assert len(held) == 100 and not prompts(held) & prompts(train)
    assert counts["left_over_by_the_mix"] == 900 - len(train)
    outputs = [tmp_path / "out" / f for f in ("train.jsonl", "eval.jsonl", "counts.json", "report.md")]
    before = [path.read_bytes() for path in outputs]
    run(tmp_path, rows, "--data", data, "--eval-share", 0.1, "--workers", 2)
    assert [path.read_bytes() for path in outputs] == before
    assert prompts(run(tmp_path, rows, "--data", data, "--eval-share", 0.1, "--seed", 1)[0]) != prompts(train)


def test_mix_of_a_given_size():
    rng = random.Random(0)
    categories = [name for name in PAPER for _ in range(2000)]
    tokens = [rng.randint(20, 60) for _ in categories]
    picked = choose(categories, tokens, PAPER, 1000, seed=0)
    assert len(picked) == pytest.approx(1000, abs=15) and picked == sorted(set(picked))
    with pytest.raises(InputError, match="'code' has a share of 0.13 but no sample"):
        choose(["general", "math", "chinese"], [1, 1, 1], PAPER, None, seed=0)


def test_source_outside_the_data_list(tmp_path):
    with pytest.raises(InputError, match="no source 'stray'"):
        run(tmp_path, [line(0, "stray")], "--data", data_list(tmp_path, {"general": 1.0}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shares": {"general": 0.5}}, "'shares' sum to 0.5"),
        ({"shares": {"other": 1.0}}, "category 'general' has no share"),
        ({"sources": [{"name": "a", "category": "general"}]}, r"'sources\[0\].licence' is missing"),
        (
            {"sources": [{"name": "a", "category": "general", "licence": "x", "prompt": "p"}]},
            "one of 'path' and 'hub'",
        ),
        (
            {"sources": [{"name": "a", "category": "general", "licence": "x", "hub": "a/b"}]},
            "one of 'prompt' and",
        ),
    ],
)
def test_bad_data_lists(tmp_path, change, message):
    path = data_list(tmp_path, {"general": 1.0}, change)
    with pytest.raises(InputError, match=message):
        load_yaml(path, DataConfig).check(str(path))


def test_recipes_that_come_with_the_project():
    recipe = load_yaml(ROOT / "configs" / "curate.yaml", CurateConfig)
    recipe.eval_share = 0.0
    assert recipe == CurateConfig(), "the recipe spells out the defaults"
    for path in sorted((ROOT / "configs" / "data").glob("*.yaml")):
        data = load_yaml(path, DataConfig)
        data.check(str(path))
        assert data.shares == PAPER or path.stem == "examples"  # one source has no mix
        assert (data.sampling.temperature, data.sampling.top_k, data.sampling.top_p) == (0.6, 20, 0.95)
    assert data.samples == 389400
