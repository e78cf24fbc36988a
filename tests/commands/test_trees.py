"""The commands' draft trees: fitted and judged by acceptance, decoded with by decoding, refused early."""

import json
import shutil

import pytest
import torch

from fastmtp import acceptance, decoding, files
from fastmtp.cli import InputError
from fastmtp.trees.tree_file import load


@pytest.fixture(scope="module")
def place(tmp_path_factory, base_folder):
    """A model, four prompts, and the model's answers to them."""
    root = tmp_path_factory.mktemp("trees")
    shutil.copytree(base_folder, root / "model")
    prompts = ["what?", "the cat", "two plus two", "sat on the mat"]
    rows = [json.dumps({"id": str(i), "prompt": text}) for i, text in enumerate(prompts)]
    (root / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    torch.save(torch.arange(0, 3), root / "small.pt")
    decode(root, "answers.jsonl")
    return root


def decode(root, out, *flags) -> list[dict]:
    """Rows of fastmtp.decoding."""
    words = [
        "--model",
        str(root / "model"),
        "--prompts",
        str(root / "prompts.jsonl"),
        "--out",
        str(root / out),
    ]
    decoding.main([*words, "--max-new-tokens", "24", *flags])
    return [json.loads(line) for line in (root / out).read_text().splitlines()]


def measure(root, *flags) -> dict:
    """The JSON of fastmtp.acceptance."""
    words = ["--model", str(root / "model"), "--data", str(root / "answers.jsonl"), "--device", "cpu"]
    out = root / "acceptance.json"
    acceptance.main([*words, "--out", str(out), *flags])
    files.release(out)
    return json.loads(out.read_text())


def test_a_tree_is_fitted_judged_and_decoded_with(place, capsys):
    tree_file = place / "tree.json"
    result = measure(place, "--fit-tree", f"12,2,{tree_file}", "--tree", "2,2,5")
    printed = capsys.readouterr().out
    tree = load(tree_file)
    assert tree.nodes == 12 and tree.depth <= 2
    about = json.loads(tree_file.read_text())["fitted_on"]
    assert about["answers"] == 2 and about["map"] == "full" and (place / "tree.json.run.json").exists()
    assert result["trees"].keys() == {str(tree_file), "2,2,5"}
    assert f"| {tree_file} | static | full | 12 | {tree.depth} |" in printed
    assert "| 2,2,5 | dynamic, topk 2 | full | 5 | 2 |" in printed and "| chain K=3 |" in printed

    # Decoding with it counts what was judged, on the answers that it was judged on.
    for name, flag in ((str(tree_file), "fitted"), ("2,2,5", "dynamic")):
        rows = decode(place, f"{flag}.jsonl", "--tree", name)
        assert all(row["identical"] for row in rows)
        judged = [sum(column) for column in zip(*(row["histogram"] for row in rows[1::2]), strict=True)]
        assert [row["histogram"] for row in result["trees"][name]] == [judged]


def test_another_tree_under_the_same_name_is_decoded_again(place, capsys):
    tree_file = place / "again.json"
    for paths, kept in (([[0]], 0), ([[0]], 4), ([[0], [1]], 0)):
        tree_file.write_text(json.dumps({"paths": paths}))
        decode(place, "again.jsonl", "--tree", str(tree_file))
        files.release(place / "again.jsonl")
        assert f"{4 - kept} asked, {kept} kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tree", "4,3"], "TOPK,DEPTH,NODES"),
        (["--tree", "none.json"], "no such tree file"),
        (["--tree", "4,2,6", "--token-map", "small.pt"], "up to 4 drafts"),
        (["--fit-tree", "16,3"], "NODES,DEPTH,FILE"),
        (["--fit-tree", "1,3,t.json"], "at least 2 nodes"),
        (["--fit-tree", "4,2,t.json", "--fit-tree", "5,2,t.json"], "named twice"),
        (["--fit-tree", "4,2,answers.jsonl"], "input of this command"),
        (["--fit-tree", "4,2,t.json", "--head", "a", "--head", "b"], "one --head"),
        (["--fit-tree", "4000,2,t.json"], "paths occur"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(place, monkeypatch, flags, reason):
    monkeypatch.chdir(place)
    with pytest.raises(InputError, match=reason):
        measure(place, *flags)
    files.release(place / "t.json")
    assert not (place / "t.json").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--token-map", "small.pt"], "up to 4 drafts, and the draft vocabulary has 3 ids"),
        (["--num-steps", "3"], "--num-steps and --tree"),
    ],
    ids=str,
)
def test_what_cannot_be_decoded_is_refused(place, monkeypatch, flags, reason):
    monkeypatch.chdir(place)
    with pytest.raises(InputError, match=reason):
        decode(place, "no.jsonl", "--tree", "4,2,6", *flags)
    assert not (place / "no.jsonl").exists()
