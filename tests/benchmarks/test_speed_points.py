"""What the speed model measures: points, variants and their command lines; the lists for a GPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import shapes
from benchmarks.speed import run as speed_model
from benchmarks.speed.points import (
    Point,
    Variant,
    command,
    listed,
    parse_gains,
    parse_variants,
    points,
    vocabulary,
)
from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.engines import sglang
from fastmtp.trees.tree import DynamicTree

ROOT = Path(__file__).parents[2]
MIMO = shapes.SHAPES["mimo-7b"]


def test_points():
    found = points(MIMO, "1,3", "full,32k", shapes.PAPER, [Variant()])
    assert [p.name for p in found] == ["baseline", "k1-full", "k3-full", "k1-32k", "k3-32k"]
    assert found[4].head_rows == 32768 and found[4].tau == pytest.approx(2.66)
    assert points(MIMO, "1", "en_8k", shapes.PAPER, [Variant()])[1].head_rows == 8192
    assert found[0].environment() == {}
    assert found[4].environment() == {
        "SGLANG_SIMULATE_ACC_LEN": "2.6600",
        "SGLANG_SIMULATE_ACC_METHOD": "match-expected",
        "SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token",
    }
    for steps, maps, message in (
        ("0", "full", "from 1"),
        ("x", "full", "whole numbers"),
        ("1", "999k", "larger than the vocab"),
    ):
        with pytest.raises(InputError, match=message):
            points(MIMO, steps, maps, shapes.PAPER, [Variant()])


def test_points_by_name():
    variants, gains = parse_variants(["fa3=", "tri=--attention-backend triton"]), parse_gains(["4,3,8=1.2"])
    names = "fa3.plain,3+32k,5,tri.3+32k@tree4x8,fa3.3+32k@tree4x16,7+8k@adaptive"
    found = listed(MIMO, names, shapes.PAPER, variants, gains)
    assert [p.name for p in found] == [
        "fa3.baseline", "k3-32k", "k5-full", "tri.k3-32k@tree4x8", "fa3.k3-32k@tree4x16", "k7-8k@adaptive"
    ]  # fmt: skip
    assert found[3].tree == DynamicTree(4, 3, 8) and found[3].head_rows == 32768
    chain = shapes.PAPER.tau(3, "32k")
    assert [p.tau for p in found[3:5]] == pytest.approx([1.2 * chain, chain])
    modes = [p.environment()["SGLANG_SIMULATE_ACC_TOKEN_MODE"] for p in found[1:]]
    assert modes == ["real-draft-token", "real-draft-token", "fixed", "fixed", "real-draft-token"]
    assert len({json.dumps(p.settings(), sort_keys=True) for p in found[3:5]}) == 2
    for names, message in (
        ("0", "expected"),
        ("no.plain", "each VARIANT with a --variant"),
        ("3@tree2x99", "draw 10 drafts"),
        ("3,3", "k3-full is named twice"),
        ("3+999k", "larger than the vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            listed(MIMO, names, shapes.PAPER, variants, gains)
    with pytest.raises(InputError, match="--tree-gain 4,3=1: expected"):
        parse_gains(["4,3=1"])


def test_the_command_line_of_a_point(tmp_path, monkeypatch):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    folder = tmp_path / "model"
    shapes.write_folder(MIMO, folder)
    line = command(Point(3, "8k", 8192, 2.66), folder, 31000, ["--attention-backend", "fa3"])
    for flag, value in (
        ("--load-format", "dummy"),
        ("--attention-backend", "fa3"),
        ("--speculative-num-steps", "3"),
        ("--cuda-graph-max-bs-decode", "1"),
        ("--port", "31000"),
    ):
        assert line[line.index(flag) + 1] == value and line.count(flag) == 1
    assert "--skip-tokenizer-init" in line
    ids = torch.load(line[line.index("--speculative-token-map") + 1], weights_only=True)
    assert ids.dtype == torch.int64 and len(ids) == 8192
    plain = command(Point(0, None, 151680, 1.0), folder, 31000, [])
    assert not [part for part in plain if "speculative" in part]


def test_trees_and_changing_steps_reach_sglang(tmp_path, monkeypatch):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    shapes.write_folder(MIMO, tmp_path / "model")
    tree, changing = listed(MIMO, "3+8k@tree4x16,7@adaptive", shapes.PAPER, [], {})
    line = command(tree, tmp_path / "model", 31000, [])
    assert line[line.index("--speculative-eagle-topk") + 1] == "4"
    assert line[line.index("--speculative-num-draft-tokens") + 1] == "16"
    assert "--speculative-adaptive" in command(changing, tmp_path / "model", 31000, [])


def test_variants():
    first, second = parse_variants(
        [
            "fa3=--attention-backend fa3 --speculative-draft-attention-backend triton",
            "lt=A=1 B='x y' --cuda-graph-max-bs=2",
        ]
    )
    assert first.flags[-1] == "triton" and first.plain_flags() == ["--attention-backend", "fa3"]
    assert second.environment == {"A": "1", "B": "x y"} and second.flags == ("--cuda-graph-max-bs-decode=2",)
    assert parse_variants(["stock="]) == [Variant("stock")]
    found = points(MIMO, "3", "32k", shapes.PAPER, [first, second], repeat=True)
    assert [p.name for p in found] == [
        "fa3.baseline", "fa3.k3-32k", "fa3.baseline-repeat", "lt.baseline", "lt.k3-32k", "lt.baseline-repeat"
    ]  # fmt: skip
    assert found[3].environment() == {"A": "1", "B": "x y"}
    assert (
        found[4].environment()["SGLANG_SIMULATE_ACC_LEN"] == "2.6600" and found[4].environment()["A"] == "1"
    )
    for item, message in (
        ("--attention-backend fa3", "expected NAME=FLAGS"),
        ("x=fa3 --attention-backend", "only VARIABLE=VALUE"),
    ):
        with pytest.raises(InputError, match=message):
            parse_variants([item])
    both = [*parse_variants(["a=", "b:a=X=1"])]
    assert [p.name for p in points(MIMO, "3", "full", shapes.PAPER, both, True)] == [
        "a.baseline", "a.k3-full", "a.baseline-repeat", "b.k3-full"
    ]  # fmt: skip
    with pytest.raises(InputError, match="no variant b with plain decoding of its own"):
        parse_variants(["a=", "c:b="])
    with pytest.raises(InputError, match="named twice"):
        parse_variants(["a=", "a="])


def test_a_map_through_our_own_draft_model_is_not_given_to_sglang_as_well(tmp_path, monkeypatch):
    from fastmtp.vocab.draft_vocab import DraftVocab

    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    folder = tmp_path / "model"
    shapes.write_folder(shapes.SHAPES["tiny"], folder)
    variants = parse_variants(["own=SGLANG_EXTERNAL_MODEL_PACKAGE=fastmtp.sglang_ext"])
    plain, full, mapped = points(shapes.SHAPES["tiny"], "3", "full,8k", shapes.PAPER, variants)
    assert not any("SGLANG_EXTERNAL_MODEL_PACKAGE" in p.environment() for p in (plain, full))
    assert "--speculative-token-map" not in command(mapped, folder, 31000, [])
    environment = vocabulary(mapped, folder)
    assert environment["SGLANG_EXTERNAL_MODEL_PACKAGE"] == "fastmtp.sglang_ext"
    vocab = DraftVocab.load(environment["FASTMTP_DRAFT_VOCAB"])
    assert len(vocab.maps[vocab.follow([1, 2, 3]).look([5] * 40)]) == 8192


@pytest.mark.parametrize("name", ["trees", "levers"])
def test_the_lists_for_a_gpu_are_ones_that_sglang_takes(name, tmp_path, monkeypatch):
    """The script's arguments, as its python would get them."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nfor word; do printf '%s\\n' \"$word\"; done\n")
    fake.chmod(0o755)
    script = ["sh", f"benchmarks/speed/{name}.sh", str(tmp_path / "out"), "--port", "31000"]
    env = {**os.environ, "PYTHON": str(fake)}
    words = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    args = speed_model.parser().parse_args(words.splitlines()[2:])
    assert args.port == 31000 and args.out == str(tmp_path / "out")
    variants, gains = parse_variants(args.variant), parse_gains(args.tree_gain)
    todo = listed(MIMO, args.points, shapes.PAPER, variants, gains)
    assert {variant.name for variant in variants} == {point.variant.name for point in todo}
    assert set(gains) <= {point.tree for point in todo}
    monkeypatch.setattr(sglang, "attention_backend", lambda: "fa3")
    files.claim(tmp_path / "out", folder=True)
    shapes.write_folder(MIMO, tmp_path / "out" / "model")
    facts = json.loads((ROOT / "tests" / "sglang_ext" / "sglang_0.5.17.json").read_text())
    for point in todo:
        line = command(point, tmp_path / "out" / "model", 31000, [])
        assert not [part for part in line if part.startswith("--") and part not in facts["flags"]]
        assert point.variant.base or any(p.variant == point.variant and not p.num_steps for p in todo)


def test_trees_get_our_kernels_where_sglang_is_the_version_they_know(monkeypatch):
    monkeypatch.delenv("FASTMTP_FAST_TREE", raising=False)
    monkeypatch.setattr(sglang, "_installed_version", lambda: "0.5.17")
    variants = parse_variants(["fa3=--attention-backend fa3", "stock:fa3=FASTMTP_FAST_TREE=0"])
    tree, stock, chain = listed(
        MIMO, "fa3.3+8k@tree4x16,stock.3+8k@tree4x16,fa3.3", shapes.PAPER, variants, {}
    )
    assert tree.environment()["FASTMTP_FAST_TREE"] == "1" and "PYTHONPATH" in tree.environment()
    assert not tree.extended  # the map stays SGLang's own
    assert "PYTHONPATH" not in tree.settings()["variant environment"]  # another checkout measures the same
    for point in (stock, chain):
        assert "SGLANG_EXTERNAL_MODEL_PACKAGE" not in point.environment()
    monkeypatch.setattr(sglang, "_installed_version", lambda: "0.5.23")
    assert "FASTMTP_FAST_TREE" not in tree.environment()
