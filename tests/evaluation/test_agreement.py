"""tau while decoding against tau from teacher forcing: equal for a decoder that computes what the head was
trained in.
"""

import json

import pytest
import torch

from evaluation import agreement
from fastmtp.cli import InputError


def check(base_folder, questions, out, *more):
    given = [
        "--model",
        str(base_folder),
        "--tasks",
        "mt_bench",
        "--backend",
        "reference",
        "--max-gen-length",
        "24",
    ]
    agreement.main([*given, "--question-folder", str(questions), "--out", str(out), *more])
    return json.loads((out / "agreement.json").read_text())["rows"]


def test_the_decoder_and_teacher_forcing_count_the_same(base_folder, questions, tmp_path, capsys):
    path = tmp_path / "small.pt"
    torch.save(torch.arange(40), path)
    names = "baseline,fastmtp:2,fastmtp:2+small,fastmtp:2+small@tree3x6"
    arms = ["--arms", names, "--token-map", f"small={path}"]
    rows = check(base_folder, questions, tmp_path / "out", *arms)
    assert [(row["arm"], row["questions"]) for row in rows] == [(name, 5) for name in names.split(",")[1:]]
    for row in rows:
        assert row["difference"] == pytest.approx(0, abs=1e-9)
        assert row["served"]["position_rates"] == pytest.approx(row["computed"]["position_rates"])
    assert "| fastmtp:2+small | mt_bench | 5 |" in capsys.readouterr().out


def test_a_count_that_is_off_fails(base_folder, questions, tmp_path):
    arms = ["--arms", "baseline,fastmtp:2"]
    check(base_folder, questions, tmp_path / "out", *arms)
    path = tmp_path / "out" / "answers" / "fastmtp-2" / "mt_bench.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for turn in row["turns"]:
            turn["verify_passes"] *= 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=r"differs by more than 0.03: fastmtp:2 on mt_bench \(-"):
        check(base_folder, questions, tmp_path / "out", *arms)


def test_wrong_use(base_folder, questions, tmp_path):
    with pytest.raises(InputError, match="no arm drafts"):
        check(base_folder, questions, tmp_path / "out", "--arms", "baseline")
    with pytest.raises(InputError, match="compare at 0"):
        check(base_folder, questions, tmp_path / "out", "--temperature", "0.5")


def test_a_tree_keeps_the_text_and_accepts_more_than_its_chain(base_folder, questions, tmp_path):
    arms = ["--arms", "fastmtp:2,fastmtp:2@tree4x12", "--max-gen-length", "40"]
    chain, tree = check(base_folder, questions, tmp_path / "out", *arms)
    assert tree["served"]["accept_length"] >= chain["served"]["accept_length"]
    assert tree["difference"] == pytest.approx(0, abs=1e-9)
    texts = [
        [
            row["turns"]
            for row in map(json.loads, (tmp_path / "out" / "answers" / arm / "mt_bench.jsonl").open())
        ]
        for arm in ("fastmtp-2", "fastmtp-2@tree4x12")
    ]
    ids = [[[turn["output_ids"] for turn in turns] for turns in rows] for rows in texts]
    assert ids[0] == ids[1]
