"""Arms: their names, and why some cannot run."""

import pytest

from evaluation.arms import parse_arms
from fastmtp.cli import InputError
from fastmtp.trees.tree import DynamicTree


def test_arms(tmp_path):
    path = tmp_path / "en_32k.pt"
    path.write_bytes(b"")
    arms = parse_arms(
        "vanilla:3,fastmtp:1,fastmtp:3+en32k@tree16,fastmtp:3+en32k,fastmtp:2@tree3x8,baseline",
        "m",
        "v",
        [f"en32k={path}"],
    )
    assert [(a.name, a.model, a.num_steps, a.token_map, a.tree) for a in arms] == [
        ("baseline", "m", 0, None, None),
        ("vanilla:3", "v", 3, None, None),
        ("fastmtp:1", "m", 1, None, None),
        ("fastmtp:3+en32k@tree16", "m", 3, str(path), DynamicTree(4, 3, 16)),
        ("fastmtp:3+en32k", "m", 3, str(path), None),
        ("fastmtp:2@tree3x8", "m", 2, None, DynamicTree(3, 2, 8)),
    ]
    assert arms[3].folder == "fastmtp-3+en32k@tree16"


@pytest.mark.parametrize(
    "arms, maps, message",
    [
        ("fastmtp", [], "not baseline, vanilla:K or fastmtp:K"),
        ("fastmtp:0", [], "not baseline"),
        ("fastmtp:3+en", [], "needs --token-map en=PATH"),
        ("vanilla:3", [], "needs --vanilla-model"),
        ("fastmtp:2@tree4x99", [], "draw 20 drafts, so nodes must be at most 21"),
        ("fastmtp:3@tree", [], "not baseline"),
        ("fastmtp:3,fastmtp:3", [], "named twice"),
        ("", [], "empty"),
        ("fastmtp:3", ["en"], "expected NAME=PATH"),
        ("fastmtp:3", ["en=/nowhere.pt"], "no such token map"),
    ],
)
def test_arms_that_cannot_run_say_why(arms, maps, message):
    with pytest.raises(InputError, match=message):
        parse_arms(arms, "m", None, maps)
