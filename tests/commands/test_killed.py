"""SIGKILL and a full disk at any point of a command: nothing is half-written or lost, and the same command
ends right.

A few points by default; `pytest tests/commands/test_killed.py --kills 20 -s` tries twenty for each command
and prints what they hit. (curate's kills are in tests/data/test_curate_input.py, more of distil's in
test_distill.py, those of train in test_train_killed.py.)
"""

import functools
import json
import random
from pathlib import Path

import pytest
from helpers.killing import Command, can_mount, contents, run_in
from helpers.tiny import chatml_tokenizer, save_folder, save_llama
from safetensors.torch import load_file, save_file

import evaluation.charts  # noqa: F401  (what is imported here costs the children nothing)
from evaluation import run as evaluation_run
from fastmtp import acceptance, build_vocab, curate, distill, export, prepare_model
from fastmtp.checkpoint import PREFIX
from fastmtp.files import read_record

TIMES = {"e2e_latency", "latency", "seconds", "wall_s", "ttft", "times"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Two models, a llama as others publish it, two heads, prompts, questions. Do not write into it."""
    folder = tmp_path_factory.mktemp("inputs")
    save_folder(folder / "model")
    save_llama(folder / "llama")
    for number in (1, 2):
        (folder / f"head-{number}").mkdir()
        head = load_file(folder / "model" / "model.safetensors")
        head = {name: tensor + number / 8 for name, tensor in head.items() if name.startswith(PREFIX)}
        save_file(head, folder / f"head-{number}" / "model.safetensors")
    write(folder / "prompts.jsonl", [{"prompt": f"what is {n} plus {n}?"} for n in range(12)])
    (folder / "questions").mkdir()
    write(folder / "questions" / "mt_bench.jsonl", [{"turns": [f"what is w{n}", "why"]} for n in range(4)])
    distill.main(distilling(folder, folder / "distilled.jsonl", 12))
    tokenizer = chatml_tokenizer()
    write(folder / "answers.jsonl", [answer(tokenizer, n) for n in range(40)])
    return folder


def answer(tokenizer, n: int) -> dict:
    """A distilled sample that curation keeps."""
    text = " ".join(
        random.Random(n).sample([a + b + c for a in "bdfgk" for b in "aeiou" for c in "nlst"], 20)
    )
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    messages = [
        {"role": "user", "content": f"what is {n}?"},
        {"role": "assistant", "content": text, "token_ids": ids},
    ]
    row = {"id": str(n), "source": "s", "lang": "en", "messages": messages, "prompt_ids": [1, 5]}
    return row | {"output_ids": ids, "finish": "stop", "key": str(n)}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lines(path: Path) -> list[dict] | None:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None


def distilling(inputs: Path, out: str | Path, limit: int) -> list[str]:
    words = f"--max-new-tokens 6 --batch-size 2 --temperature 0 --dtype float32 --device cpu --limit {limit}"
    return [
        *("--model", str(inputs / "model"), "--prompts", str(inputs / "prompts.jsonl")),
        *("--out", str(out), *words.split()),
    ]


def folder_result(out: Path) -> dict | None:
    """What a folder that is written whole holds; of its record, only that it is there."""
    return (
        {name: hashed for name, hashed in contents(out).items() if name != "run.json"}
        if out.exists()
        else None
    )


def old_or_new(name: str, place: Path, before, expected) -> None:
    """The folder or file under this name is the old one or the new one, unless it waits beside it."""
    now = folder_result(place / name)
    if before is None:
        assert now in (None, expected)
    else:
        waiting = [folder_result(path) for path in place.glob(f".{name}.*.old")]
        assert now in (before, expected) or before in waiting
    assert now is None or read_record(place / name / "run.json") is not None


def exporting(inputs: Path, old: bool) -> Command:
    def words(head: int) -> list[str]:
        return ["--base", str(inputs / "model"), "--head", str(inputs / f"head-{head}"), "--out", "out"]

    def make(place: Path) -> None:
        place.mkdir(exist_ok=True)
        if old:
            export.main([*words(1)[:-1], str(place / "out")])

    action = functools.partial(export.main, words(2))
    return Command(make, action, lambda p: folder_result(p / "out"), functools.partial(old_or_new, "out"))


def preparing(inputs: Path, source: str, old: bool) -> Command:
    def make(place: Path) -> None:
        place.mkdir(exist_ok=True)
        if old:
            other = "llama" if source == "model" else "model"
            prepare_model.main(["--model", str(inputs / other), "--out", str(place / "out")])

    action = functools.partial(prepare_model.main, ["--model", str(inputs / source), "--out", "out"])
    return Command(make, action, lambda p: folder_result(p / "out"), functools.partial(old_or_new, "out"))


def distilled(inputs: Path) -> Command:
    """Twelve prompts, of which four were answered before."""

    def make(place: Path) -> None:
        place.mkdir(exist_ok=True)
        distill.main(distilling(inputs, place / "out.jsonl", 4))

    def result(place: Path) -> list[dict] | None:
        return sorted(lines(place / "out.jsonl"), key=lambda row: row["key"])

    def kept(place: Path, before: list[dict], expected: list[dict]) -> None:
        assert result(place) in (before, expected)
        partial = place / ".out.jsonl.partial"
        rows = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
        rows = [json.loads(row) for row in rows if row.endswith(b"\n")]
        assert all(row in expected for row in rows)

    return Command(make, functools.partial(distill.main, distilling(inputs, "out.jsonl", 12)), result, kept)


def evaluating(inputs: Path) -> Command:
    """Three questions to two arms, after an earlier run that asked one."""

    def words(count: int, out: str | Path) -> list[str]:
        return [
            *(
                "--model",
                str(inputs / "model"),
                "--question-folder",
                str(inputs / "questions"),
                "--out",
                str(out),
            ),
            *(
                "--backend",
                "reference",
                "--device",
                "cpu",
                "--dtype",
                "float32",
                "--arms",
                "baseline,fastmtp:2",
            ),
            *("--tasks", "mt_bench", "--max-gen-length", "6", "--repeat-questions", "1"),
            *("--num-questions", str(count)),
        ]

    def make(place: Path) -> None:
        place.mkdir(exist_ok=True)
        evaluation_run.main(words(1, place / "out"))

    def answers(place: Path) -> dict:
        rows = {}
        for path in sorted((place / "out" / "answers").rglob("*.jsonl")):
            text = path.read_bytes()
            for row in map(json.loads, text[: text.rfind(b"\n") + 1].splitlines()):
                assert (path.parent.name, row["question"]) not in rows, "asked twice"
                turns = [(turn["output_ids"], turn["verify_passes"]) for turn in row["turns"]]
                rows[path.parent.name, row["question"]] = turns
        return rows

    def result(place: Path) -> tuple:
        table = lines(place / "out" / "results.jsonl")
        figures = ("arm", "num_questions", "output_tokens", "accept_length", "position_rates", "lossless")
        return answers(place), [{name: row[name] for name in figures} for row in table]

    def kept(place: Path, before: tuple, expected: tuple) -> None:
        now, table = result(place)
        assert table in (before[1], expected[1])
        assert before[0].items() <= now.items() <= expected[0].items()

    return Command(make, functools.partial(evaluation_run.main, words(3, "out")), result, kept)


def other_commands(inputs: Path) -> dict[str, Command]:
    """What is not killed here; each makes some files in the folder `out`, where an older run's lie."""
    model, data = str(inputs / "model"), str(inputs / "distilled.jsonl")
    measured = ["--model", model, "--data", data, "--device", "cpu", "--out", "out/acceptance.json"]
    counted = ["--tokenizer", model, "--input", data, "--sizes", "270,280", "--out", "out"]
    return {
        "acceptance": again_in_out(acceptance.main, measured, ["--num-steps", "1"]),
        "build_vocab": again_in_out(build_vocab.main, counted, ["--sizes", "270"]),
        "curate": again_in_out(
            curate.main,
            ["--input", str(inputs / "answers.jsonl"), "--workers", "1", "--out", "out"],
            ["--seed", "1"],
        ),
    }


def again_in_out(main, words: list[str], older: list[str]) -> Command:
    """`main(words)` after `main` with `older` words on top."""

    def make(place: Path) -> None:
        place.mkdir(exist_ok=True)
        assert run_in(place, functools.partial(main, [*words, *older])).code == 0

    def result(place: Path) -> dict:
        names = {name: value for name, value in contents(place / "out").items() if "run.json" not in name}
        return {name: value for name, value in names.items() if not name.endswith(".png")}

    def kept(place: Path, before: dict, expected: dict) -> None:
        now = result(place)
        for name, value in before.items():
            assert now.get(name) in (value, expected.get(name)), name
        assert all(before.get(name) == value or expected[name] == value for name, value in now.items())

    return Command(make, functools.partial(main, words), result, kept)


def commands(inputs: Path) -> dict[str, Command]:
    return {
        "prepare_model llama": preparing(inputs, "llama", old=False),
        "prepare_model mimo over an older one": preparing(inputs, "model", old=True),
        "export": exporting(inputs, old=False),
        "export over an older one": exporting(inputs, old=True),
        "distill": distilled(inputs),
        "evaluate": evaluating(inputs),
    }


NAMES = list(commands(Path()))


@pytest.mark.parametrize("name", NAMES)
def test_killed_anywhere_the_same_command_ends_right(name, inputs, tmp_path, request):
    kills = request.config.getoption("--kills")
    hits = commands(inputs)[name].killed(tmp_path, kills)
    print(f"\n{name}: {kills} kills: {dict(hits)}")
    assert hits["ended right"] == kills


@pytest.mark.parametrize("disk", [False, True], ids=["error", "small disk"])
@pytest.mark.parametrize("name", [*NAMES, *other_commands(Path())])
def test_a_full_disk_is_one_line_and_loses_nothing(name, disk, inputs, tmp_path, request):
    if disk and not can_mount():
        pytest.skip("no right to mount a small disk here")
    times = request.config.getoption("--kills")
    command = (commands(inputs) | other_commands(inputs))[name]
    print(f"\n{name}: full at {times} points: exit codes {dict(command.filled(tmp_path, times, disk))}")
