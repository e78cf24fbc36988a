"""The checks of the following draft vocabulary, against a made-up server: what they ask, compare and
refuse.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.stand_in import free_port

from benchmarks import shapes
from benchmarks.dynamic_vocabulary import check as vocab_check
from benchmarks.dynamic_vocabulary import cost as vocab_cost
from benchmarks.dynamic_vocabulary import cost_table
from benchmarks.dynamic_vocabulary.cost import Arm
from evaluation.backends import Turn
from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.engines import sglang

STAND_IN = str(Path(__file__).parents[1] / "helpers" / "stand_in.py")


@pytest.fixture
def asked(tmp_path, base_folder, monkeypatch):
    """Arguments of vocab_check, whose servers are stand-ins; the dynamic one says `says` at its start."""
    for lang, words in (("en", "what is two"), ("zh", "the cat sat")):
        rows = [{"id": f"{lang}{i}", "prompt": f"{words} {i}"} for i in range(3)]
        (tmp_path / f"{lang}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        torch.save(torch.arange(20), tmp_path / f"{lang}.pt")

    def make(says=sglang.VOCAB_READY):
        def command(serving):
            options = f"--port {serving.port} --num-steps {serving.num_steps}"
            line = f"echo '{says}'; exec {sys.executable} {STAND_IN} {options}"
            return ["sh", "-c", line]

        monkeypatch.setattr(sglang, "command", command)
        monkeypatch.setattr(sglang, "sglang_version", lambda: "0.5.17")
        maps = f"en={tmp_path}/en.pt,zh={tmp_path}/zh.pt"
        prompts = [str(tmp_path / "en.jsonl"), str(tmp_path / "zh.jsonl")]
        return [
            "--model",
            str(base_folder),
            "--token-maps",
            maps,
            "--prompts",
            *prompts,
            "--out",
            str(tmp_path / "out"),
        ]

    return make


def answer(ids, passes=None):
    return Turn(ids, "", 4, passes, [], 1, 1.0, 2.0, 0.0, "length")


def test_every_way_is_compared_with_plain_decoding(asked, tmp_path, capsys):
    vocab_check.main(asked())
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert len(found["ways"]) == 9 and all(
        row["identical"] == row["prompts"] == 6 for row in found["ways"].values()
    )
    assert (
        found["ways"]["dynamic, eight at once"]["accept_length"]["zh"] > 1
        and "accept_length" not in found["ways"]["plain, eight at once"]
    )
    assert (
        "dynamic, asking for the other map: 6 of 6 outputs are plain decoding's; tau en "
        in capsys.readouterr().out
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [row["lang"] for row in rows] == ["en", "zh"] * 3
    assert [row["output_ids"] for row in rows] == found["outputs"]["plain, one at a time"]


def test_an_extension_that_is_not_used_fails(asked):
    with pytest.raises(SystemExit, match="does not use fastmtp.sglang_ext"):
        vocab_check.main(asked("something else"))


def test_differences_and_drafts_outside_the_map_are_found():
    found = {"plain, one at a time": [answer([1, 2]), answer([3])]}
    found["dynamic, one at a time"] = [answer([1, 2], passes=1), answer([4, 5, 6], passes=2)]
    log = "x\nAssertionError: draft 5 is outside the map 'en'\ndraft vocabulary: no token map for 'klingon'"
    result = vocab_check.report(found, ["en", "zh"], log)
    assert result["ways"]["dynamic, one at a time"]["differences"] == [{"prompt": 1, "position": 0}]
    assert result["ways"]["dynamic, one at a time"]["accept_length"] == {"en": 2.0, "zh": 1.5}
    assert result["outside_the_map"] == 1 and result["warnings_for_the_unknown_language"] == 1


def test_one_prompt_file_for_each_map(asked):
    argv = asked()
    argv.remove(argv[argv.index("--prompts") + 2])
    with pytest.raises(InputError, match="1 files for 2 maps"):
        vocab_check.main(argv)


def test_a_toy_vocabulary_keeps_an_answer_in_its_language():
    vocab = vocab_cost.toy_vocab(100, 500)
    assert vocab.follow(list(range(100, 164))).look(list(range(130, 190))) == "zh"
    assert vocab.follow(list(range(64))).look(list(range(30, 90))) == "en"


def test_servers_of_the_arms(tmp_path):
    folder = tmp_path / "model"
    shapes.write_folder(shapes.SHAPES["tiny"], folder)
    made = {
        kind: vocab_cost.start(Arm(kind, 64), folder, 1, 2.4, 3, [], shapes.SHAPES["tiny"])
        for kind in ("full", "stock", "auto")
    }
    assert (
        "--speculative-token-map" in made["stock"].argv and "--speculative-token-map" not in made["auto"].argv
    )
    assert made["auto"].env["SGLANG_EXTERNAL_MODEL_PACKAGE"] == "fastmtp.sglang_ext"
    assert Path(made["auto"].env["FASTMTP_DRAFT_VOCAB"]).exists()
    assert (
        "FASTMTP_DRAFT_VOCAB" not in made["full"].env
        and made["full"].env["SGLANG_SIMULATE_ACC_LEN"] == "2.4000"
    )


def turn(tokens, passes, seconds):
    return Turn([1] * tokens, "", 4, passes, [], 1, 1.0, 1.0 + seconds, 0.0, "length")


def test_figures_by_hand(tmp_path):
    row = vocab_cost.record("x", [turn(11, 5, 2.0), turn(21, 5, 3.0)])
    assert row["tau"] == 3.0 and row["ms_per_cycle"] == 500.0 and row["tokens_per_s"] == pytest.approx(32 / 7)
    names = {"en": 2.0, "zh": 1.0, "mixed": 1.8, "union": 2.2, "auto": 1.9, "full": 2.5}
    rows = [{"lang": lang, "source": s, "map": n, "output_tokens": int(100 * tau), "verify_passes": 100}
            for lang in ("en", "zh") for s in "ab" for n, tau in names.items()]  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps({"rows": rows}))
    taus = cost_table.read_taus(str(tmp_path / "t.json"))
    assert taus["zh"] == pytest.approx(names)
    cycles = {"full": 10.0, "stock 16k": 8.0, "auto 16k": 8.1, "stock 30k": 9.0}
    found = cost_table.speeds({n: {"ms_per_cycle": ms} for n, ms in cycles.items()}, taus, 16384, 30720)
    speed = {(r["lang"], r["choice"]): r["tokens_per_s"] for r in found}
    assert speed["en", "fixed, right"] == pytest.approx(250) and speed["zh", "fixed, right"] == pytest.approx(
        125
    )
    assert speed["en", "fixed, wrong"] == pytest.approx(125) and speed["en", "following"] == pytest.approx(
        1900 / 8.1
    )
    assert speed["en", "union"] == pytest.approx(2200 / 9) and speed["en", "whole head"] == pytest.approx(250)
    report = {"gpu": "g", "kernels": [], "arms": [row], "speeds": found}
    assert "| 16k | zh | fixed, right | 1.000 | 8.000 | 125.0 |" in cost_table.markdown(report)
    (tmp_path / "t.json").write_text(json.dumps({"rows": rows[:6]}))
    with pytest.raises(InputError, match="no rows for 'zh'"):
        cost_table.read_taus(str(tmp_path / "t.json"))


def test_switches_are_read_from_the_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("draft vocabulary: ready\n")
    assert vocab_cost.switches_in(log) is None
    log.write_text("[x] draft vocabulary: active en; 12 switches; tokens drafted: en 5\n")
    assert vocab_cost.switches_in(log) == 12


def test_a_measured_folder_needs_no_gpu_to_be_reported_again(tmp_path, capsys, monkeypatch):
    arms = ["full", "stock 64", "auto 64", "stock 100"]
    names = {name: [vocab_cost.record(name, [turn(11, 5, 2.0)])] for name in arms}
    kernels = [{"rows": 64, "switch_us": 1.0, "head_us": 2.0, "static_us": 3.0}]
    kernels += [kernels[0] | {"rows": rows} for rows in (100, shapes.SHAPES["tiny"]["vocab_size"])]
    argv = ["--shape", "tiny", "--sizes", "64", "--unions", "100", "--out", str(tmp_path)]
    files.claim(tmp_path, folder=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(vocab_cost, "gpu_name", lambda: None)
    with pytest.raises(InputError, match="no GPU here"):
        vocab_cost.main(argv)
    args = vocab_cost.parser().parse_args(argv)
    depends = vocab_cost.depends(args, shapes.SHAPES["tiny"], []) | {"gpu": "H", "sglang": "0.5.17"}
    measured = {"fingerprint": depends, "kernels": kernels, "arms": names}
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    vocab_cost.main(argv)
    shown = capsys.readouterr()
    assert "| 64 | 1.0 | 2.0 | 3.0 |" in shown.out and (tmp_path / "cost.md").exists()
    assert "0 servers to measure, 4 kept" in shown.err
    # Other settings, or a GPU of another name that is here: nothing is mixed.
    for more, message in (
        (["--tau", "2.5"], "tau: 2.4 -> 2.5"),
        (["--tokens", "64"], "tokens: 256 -> 64"),
        (["--", "--dtype", "float32"], "flags: "),
    ):
        with pytest.raises(InputError, match=f"measured with other settings .*{message}"):
            vocab_cost.main([*argv, *more])
    monkeypatch.setattr(vocab_cost, "gpu_name", lambda: "another")
    with pytest.raises(InputError, match='gpu: "H" -> "another"'):
        vocab_cost.main(argv)


def test_a_dead_arm_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    shapes.write_folder(shapes.SHAPES["tiny"], tmp_path / "model")
    monkeypatch.setattr(sglang, "sglang_version", lambda: "0.5.17")

    def line(serving):
        port, steps = str(serving.port), str(serving.num_steps)
        alive = [sys.executable, STAND_IN, "--port", port, "--num-steps", steps]
        return ["false"] if serving.token_map else alive

    monkeypatch.setattr(sglang, "command", line)
    args = vocab_cost.parser().parse_args(
        ["--requests", "2", "--tokens", "20", "--at-once", "3", "--out", str(tmp_path)]
    )
    args.port = free_port()
    done = {"arms": {}}
    files.claim(tmp_path, folder=True)
    arms = [Arm("stock", 64), Arm("full", 512), Arm("auto", 64)]
    failed = vocab_cost.measure_all(arms, args, [], shapes.SHAPES["tiny"], tmp_path, done)
    assert list(failed) == ["stock 64"] and "the server ended with exit code 1" in failed["stock 64"]
    kept = json.loads((tmp_path / "measured.json").read_text())["arms"]
    assert [row["name"] for rows in kept.values() for row in rows] == [
        "full",
        "auto 64",
        "auto 64, languages in turn",
    ]
