"""The maps that the project ships: whole, as their JSON says, and of use to the engine."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from fastmtp.vocab.token_map import load_token_map, map_name

FOLDER = Path(__file__).resolve().parents[2] / "vocab"
MAPS = sorted(FOLDER.glob("*/*.pt"))


def test_the_maps_are_there():
    names = {str(path.relative_to(FOLDER)) for path in MAPS}
    assert {f"qwen2/{lang}_{n}k.pt" for lang in ("en", "zh", "union") for n in (8, 16, 32, 64)} <= names
    assert {f"smollm2/en_{n}k.pt" for n in (8, 16, 32)} <= names


@pytest.mark.parametrize("path", MAPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_map_and_json_agree(path):
    info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    stored = torch.load(path, weights_only=True)
    ids = load_token_map(path, info["tokenizer"]["ids"])
    assert stored.dtype == torch.int64 and torch.equal(
        stored, ids
    )  # sorted and without duplicates as it lies there
    assert len(ids) == info["size"] and path.stem == map_name(info["lang"], info["size"])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == info["sha256"]
    assert all(0 < share <= 1 for share in info["coverage_of_held_out"].values())
    assert info["command"].startswith(
        "python -m fastmtp.build_vocab --tokenizer models/"
    )  # nobody's own folders


@pytest.mark.parametrize("path", [p for p in MAPS if p.parent.name == "qwen2"], ids=lambda path: path.stem)
def test_qwen2_maps_hold_bytes_and_special_tokens(path):
    ids = set(load_token_map(path, 151680).tolist())
    assert set(range(256)) <= ids and set(range(151643, 151665)) <= ids and max(ids) < 151665
