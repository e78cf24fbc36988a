"""The command from distilled lines to ms-swift's files: rows, split, report, recipes, a full disk."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.curating import line, prompts, run, write

from fastmtp import curate
from fastmtp.cli import InputError
from fastmtp.data.scan import training_row

ROOT = Path(__file__).resolve().parents[2]


def test_rows_have_the_exact_ids_and_nothing_else(tmp_path):
    samples = [line(n, turns=1 + n % 3) for n in range(20)]
    train, held, counts = run(tmp_path, samples)
    assert not held and counts["dropped"] == {}
    expected = [
        [
            {
                "role": m["role"],
                "content": {"token_ids": m["token_ids"]} if m["role"] == "assistant" else m["content"],
            }
            for m in sample["messages"]
        ]
        for sample in samples
    ]
    assert sorted(map(str, expected)) == sorted(str(row["messages"]) for row in train)
    assert all(set(row) == {"messages"} for row in train)
    assert [row["messages"] for row in train] != expected, "the order is shuffled"
    assert counts["train"]["tokens"] == sum(31 * (1 + n % 3) for n in range(20))


def test_given_turns_stay_text_and_are_not_learnt(tmp_path):
    mixed = line(0, turns=2)
    del mixed["messages"][1]["token_ids"]
    train, _, _ = run(tmp_path, [mixed, line(1)])
    marks = {len(row["messages"]): [m.get("loss") for m in row["messages"]] for row in train}
    assert marks == {4: [None, False, None, True], 2: [None, True]}, "one row says it, so all do"
    given = next(row["messages"][1] for row in train if len(row["messages"]) == 4)
    assert given["content"] == mixed["messages"][1]["content"]


def test_output_ids_serve_where_the_answer_has_none():
    sample = line(0)
    del sample["messages"][1]["token_ids"]
    row, ((text, ids),) = training_row(sample, "x:1")
    assert row[1]["content"] == {"token_ids": sample["output_ids"]} == {"token_ids": ids}
    assert text == sample["messages"][1]["content"]


def test_what_is_dropped_and_why(tmp_path):
    good = line(0)
    shouted = json.loads(json.dumps(good))
    shouted["messages"][1]["content"] = good["messages"][1]["content"].upper() + "!"
    retold = line(1)
    retold["messages"][0] = good["messages"][0]
    near = json.loads(json.dumps(good))
    near["messages"][0]["content"] = "bark " + near["messages"][0]["content"]
    empty = line(3)
    empty["messages"][1]["content"] = " "
    question = line(4)
    exclude = write(tmp_path / "bench.jsonl", [{"problem": question["messages"][0]["content"]}])
    rows = [
        good,
        shouted,
        retold,
        near,
        empty,
        question,
        line(5, finish="length"),
        line(6),
        line(7, length=400),
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("clean: {max_tokens: 300}\n")
    train, _, counts = run(tmp_path, rows, "--exclude", exclude, "--recipe", recipe)
    assert counts["dropped"] == dict.fromkeys(
        ["exact_duplicate", "same_prompt", "near_duplicate", "empty", "benchmark", "truncated", "too_long"], 1
    )
    assert prompts(train) == prompts([good, line(6)]) and counts["read"] == 9
    report = (tmp_path / "out" / "report.md").read_text()
    for reason in counts["dropped"]:
        assert f"### {reason}" in report
    assert "distilled.jsonl:4" in report and "similarity" in report and "distilled.jsonl:1" in report
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["clean"]["max_tokens"] == 300
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith((".", "tmp"))]


def test_several_answers_to_one_prompt_can_be_kept(tmp_path):
    rows = [line(n) for n in range(4)]
    for row in rows:
        row["messages"][0]["content"] = "Say something."
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dedup: {prompt_threshold: null}\n")
    assert len(run(tmp_path, rows, "--recipe", recipe)[0]) == 4
    assert len(run(tmp_path, rows)[0]) == 1


def test_split_holds_out_no_neighbour_of_train(tmp_path, capsys):
    # Half of the set comes in pairs too unlike to drop but too alike to be on both sides.
    rows = [line(n) for n in range(100)]
    for n in range(0, 50, 2):
        words = rows[n]["messages"][1]["content"].split()
        rows[n + 1]["messages"][1]["content"] = " ".join(
            words[:24] + ["zoo", "yak", "xyz", "wok", "vat", "urn"]
        )
        rows[n + 1]["messages"][0]["content"] = "please " + rows[n]["messages"][0]["content"] + " or not"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "dedup: {threshold: 0.75, prompt_threshold: null, split_margin: 0.3}\neval_share: 0.2\n"
    )
    train, held, counts = run(tmp_path, rows, "--recipe", recipe)
    assert len(held) == 20 and len(train) == 80 and not counts["dropped"]
    assert prompts(held) <= prompts(rows[50:])
    assert not prompts(held) & prompts(train)
    run(tmp_path, rows, "--recipe", recipe, "--eval-share", 0.8)
    assert "not 80" in capsys.readouterr().err


def test_gzip_and_several_files_the_first_one_wins(tmp_path):
    one = write(tmp_path / "a.jsonl.gz", [line(0, "better"), line(1, "better")])
    two = write(tmp_path / "b.jsonl", [line(0, "better") | {"source": "worse"}, line(2, "worse"), ""])
    curate.main(["--input", one, two, "--out", str(tmp_path / "out"), "--workers", "1"])
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["sources"]["better"] == {"train": 2, "eval": 0, "dropped": {}}
    assert counts["sources"]["worse"] == {"train": 1, "eval": 0, "dropped": {"exact_duplicate": 1}}


@pytest.mark.parametrize(
    "text, message",
    [
        ("clean: {min_token: 3}", "unknown key 'clean.min_token'; known: .*min_tokens"),
        ("sed: 1", "unknown key 'sed'"),
        ("seed: one", "'seed' must be int, not 'one'"),
        ("seed: true", "'seed' must be int, not True"),
        ("eval_share: 1.5", "eval-share must be at least 0 and below 1"),
        ("dedup: 3", "'dedup' must be a block of keys, not 3"),
        ("exclude: [3]", r"'exclude\[0\]' must be str"),
        ("clean: [", "recipe.yaml:2: not YAML"),
        ("exclude: [nowhere.jsonl]", "nowhere.jsonl: no such file"),
        ("data: nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text + "\n")
    with pytest.raises(InputError, match=message):
        run(tmp_path, [line(0)], "--recipe", recipe)


def test_nothing_left_says_what_went(tmp_path):
    with pytest.raises(InputError, match=r"no sample is left to train on \(truncated 3\)"):
        run(tmp_path, [line(n, finish="length") for n in range(3)])
    with pytest.raises(InputError, match="the file is empty"):
        run(tmp_path, [])


def test_full_disk_is_said_in_one_line_and_leaves_no_half_file(tmp_path, monkeypatch):
    run(tmp_path, [line(n) for n in range(5)])
    before = (tmp_path / "out" / "train.jsonl").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(curate.Clean, "row", full)
    with pytest.raises(InputError, match="out.*: the disk is full; free some space"):
        run(tmp_path, [line(n) for n in range(9)])
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_command_line(tmp_path):
    def command(*options):
        return subprocess.run(
            [sys.executable, "-m", "fastmtp.curate", *options], capture_output=True, text=True, cwd=ROOT
        )

    assert "example:" in command("--help").stdout
    result = command("--input", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out"))
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "none.jsonl: no such file" in result.stderr
    )
    source = write(tmp_path / "distilled.jsonl", [line(n) for n in range(300)])
    result = command("--input", source, "--out", str(tmp_path / "out"), "--eval-share", "0.1")
    assert result.returncode == 0 and "270 train, 30 eval" in result.stdout and result.stderr == ""


@pytest.mark.slow
def test_ms_swift_keeps_the_ids(tmp_path, monkeypatch):
    """What ms-swift loads is what was written, also beyond the first 10 MB by which `datasets` decides on
    types.
    """
    pytest.importorskip("swift", reason="ms-swift is not installed")
    for variable in ("MODELSCOPE_CACHE", "HF_DATASETS_CACHE", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    rows = [line(n, turns=1 + n % 2, length=1500) for n in range(1400)]
    for row in rows[:-50:-7]:
        row["messages"][-1]["content"] = "given"
    for row in rows[::101]:
        row["messages"] = [{"role": "system", "content": "Be brief. 简短"}, *row["messages"]]
    for row in rows[-20:]:
        if len(row["messages"]) > 2:
            del row["messages"][1]["token_ids"]
    train, _, _ = run(tmp_path, rows)
    path = tmp_path / "out" / "train.jsonl"
    assert path.stat().st_size > 11e6
    from swift.dataset import load_dataset

    loaded, _ = load_dataset([str(path)], split_dataset_ratio=0.0, shuffle=False)
    assert len(loaded) == len(train)
    assert all(a["messages"] == b["messages"] for a, b in zip(loaded, train, strict=True))
