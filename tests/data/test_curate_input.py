"""What curate does with lines that are not what the distiller writes: named, or left out and counted."""

import gzip
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from fastmtp import curate, files
from fastmtp.cli import InputError

TEXTS = ["it is four", "the dog sat on the log", "two plus two is four", "the cat sat on the mat", "you are"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(n: int, tokenizer, **changes) -> dict:
    """A line of the distiller: a question and an answer of words of their own, with their true ids."""
    rng = random.Random(n)
    text = " ".join(rng.choices("cat dog log mat four eight two system helpful assistant".split(), k=12))
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    question = "".join(rng.choices("abcdefgh", k=8)) + f" {' '.join(rng.choices(TEXTS, k=3))} {n}?"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text, "token_ids": ids},
    ]
    row = {"id": str(n), "source": "s", "lang": "en", "messages": messages, "prompt_ids": [5, 6]}
    return row | {"output_ids": ids, "finish": "stop", "key": str(n)} | changes


def write(rows: list, path: str = "in.jsonl") -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def run(*words: str) -> dict:
    curate.main(["--input", "in.jsonl", "--out", "out", "--workers", "1", *words])
    return json.loads(Path("out/counts.json").read_text())


def changed(row: dict, ids: object) -> dict:
    row["messages"][-1]["token_ids"] = row["output_ids"] = ids
    return row


@pytest.mark.parametrize(
    "ids", [[-1, 5, 2], [5.0, 2], [True, 2], ["5", 2], [None], [[5]], "5", {"a": 1}, [2**40]]
)
def test_ids_that_are_no_token_ids_are_named(place, tokenizer, ids):
    write([sample(0, tokenizer), sample(1, tokenizer), changed(sample(2, tokenizer), ids)])
    with pytest.raises(InputError, match=r"in.jsonl:3: '(output_ids|token_ids).*(token id|list of)"):
        run()
    assert not Path("out/train.jsonl").exists()


def test_prompt_ids_and_two_accounts_of_one_answer_are_checked_too(place, tokenizer):
    write([sample(0, tokenizer, prompt_ids=[5, -7])])
    with pytest.raises(InputError, match="in.jsonl:1: 'prompt_ids' holds -7"):
        run()
    write([sample(0, tokenizer), sample(1, tokenizer, output_ids=[9, 9, 2])])
    with pytest.raises(InputError, match="in.jsonl:2: 'output_ids' are not the last answer's"):
        run()


@pytest.mark.parametrize(
    "ids, reason", [([10**6, 2], "unknown_ids"), ([70, 71, 72, 2], "other_text")], ids=["range", "spelling"]
)
@pytest.mark.parametrize("recorded", [True, False])
def test_ids_of_another_tokenizer_are_left_out_and_counted(
    place, tokenizer, base_folder, capsys, ids, reason, recorded
):
    rows = [sample(n, tokenizer) for n in range(30)]
    write([*rows, changed(sample(30, tokenizer), ids)])
    words = ["--model", str(base_folder)]
    if recorded:
        words = []
        record = {
            "command": "python -m fastmtp.distill",
            "config": {"model": str(base_folder)},
            "versions": {},
        }
        Path("in.jsonl.run.json").write_text(json.dumps(record))
    counts = run(*words)
    assert counts["dropped"] == {reason: 1} and counts["train"]["samples"] == 30
    assert "left out 1 of 31 samples, the first: in.jsonl:31: token ids" in capsys.readouterr().err
    assert json.loads(Path("out/run.json").read_text())["config"]["model"] == str(base_folder)
    write([changed(row, ids) if n % 5 == 0 else row for n, row in enumerate(rows)])
    with pytest.raises(InputError, match="in.jsonl:1: token ids .* and so 6 of 30 samples"):
        run(*words)


def test_inputs_of_two_models_need_one_name(place, tokenizer, base_folder):
    for name in ("in", "other"):
        write([sample(ord(name[0]), tokenizer)], f"{name}.jsonl")
        Path(f"{name} model").mkdir()
        record = {"command": "x", "config": {"model": f"{name} model"}, "versions": {}}
        Path(f"{name}.jsonl.run.json").write_text(json.dumps(record))
    words = ["--input", "in.jsonl", "other.jsonl", "--out", "out", "--workers", "1"]
    with pytest.raises(InputError, match="of in model and other model; give one --model"):
        curate.main(words)
    curate.main([*words, "--model", str(base_folder)])


def user(content: object, **more: object) -> dict:
    return {"role": "user", "content": content, **more}


def answer(content: object) -> dict:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"messages": None}, "'messages' must be a list"),
        ({"messages": "text"}, "'messages' must be a list"),
        ({"messages": [user("x"), "y"]}, "must be a list of {role, content}"),
        ({"messages": [user(None), user("x")]}, "message 0 needs a text as 'content', not null"),
        ({"messages": [user(3), user("x")]}, "message 0 needs a text as 'content', not a number"),
        ({"messages": [user([{"type": "text"}]), user("x")]}, "not a list"),
        ({"messages": [{"content": "x"}, user("x")]}, "message 0 has the role None"),
        ({"messages": [user("x"), {"role": "tool", "content": "sunny"}, user("x")]}, "the role 'tool'"),
        ({"messages": [user("x"), {"role": "function", "content": "1"}, user("x")]}, "the role 'function'"),
        ({"messages": [{"role": "developer", "content": "x"}, user("x")]}, "the role 'developer'"),
        ({"tools": [{"name": "weather"}]}, "`tools` is not supported"),
        ({"functions": "[]"}, "`functions` is not supported"),
        ({"images": ["a.png"]}, "`images` is not supported"),
        ({"source": ["a"]}, "'source' must be a text"),
        ({"lang": {"a": 1}}, "'lang' must be a text"),
        ({"finish": True}, "'finish' must be a text"),
    ],
)
def test_a_line_that_is_no_sample_is_named(place, tokenizer, change, words):
    write([sample(0, tokenizer), sample(1, tokenizer) | change])
    with pytest.raises(InputError, match=f"in.jsonl:2: .*{words}"):
        run()


@pytest.mark.parametrize(
    "row, words",
    [
        ("{broken", "not JSON .*fix or remove"),
        ("[1]", "expected a JSON object"),
        ({"prompt": "x"}, "'messages' must be a list"),
        ({"messages": [user("x"), user("x")]}, "the last message is no answer"),
        ({"messages": [user("x"), answer("y")]}, "the answer has no 'token_ids'"),
        ({"messages": [{"role": "user"}, answer("y")]}, "message 0 needs a text"),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_broken_line_is_named_by_any_number_of_workers(place, tokenizer, row, words, workers):
    write([sample(0, tokenizer), row, sample(1, tokenizer)])
    with pytest.raises(InputError, match=f"in.jsonl:2: .*{words}"):
        run("--workers", workers)
    assert not Path("out/train.jsonl").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("cut", [slice(None, -20), slice(5, None)], ids=["end", "start"])
def test_broken_gzip_is_named(place, tokenizer, cut, workers):
    whole = "".join(json.dumps(sample(n, tokenizer)) + "\n" for n in range(50))
    Path("in.jsonl.gz").write_bytes(gzip.compress(whole.encode())[cut])
    with pytest.raises(InputError, match="in.jsonl.gz: cannot be read"):
        curate.main(["--input", "in.jsonl.gz", "--out", "out", "--workers", workers])


def test_tool_calls_are_not_dropped_silently(place, tokenizer):
    row = sample(0, tokenizer)
    row["messages"][1]["tool_calls"] = [{"function": {"name": "f"}}]
    write([row])
    with pytest.raises(InputError, match="in.jsonl:1: message 1: `tool_calls` is not supported"):
        run()


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"source": "half \\ud83d", "messages": []}', "not valid UTF-8"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "not valid UTF-8"),
        ("[" * 100000, "too deeply nested"),
        ('{"prompt_ids": [' + "1" * 5000 + "]}", "too large"),
        ("\udcff", "not UTF-8"),
        ("null", "expected a JSON object"),
    ],
    ids=["source", "content", "nesting", "digits", "bytes", "null"],
)
def test_a_line_that_no_file_can_hold_again_is_named(place, tokenizer, line, words):
    text = json.dumps(sample(0, tokenizer)) + "\n" + line + "\n"
    Path("in.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=f"in.jsonl:2: .*{words}"):
        run()


def test_a_byte_order_mark_is_passed_over(place, tokenizer):
    rows = "".join(json.dumps(sample(n, tokenizer)) + "\n" for n in range(4))
    Path("in.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert run()["train"]["samples"] == 4
    with gzip.open("in.jsonl.gz", "wb") as out:
        out.write(b"\xef\xbb\xbf" + rows.encode())
    curate.main(["--input", "in.jsonl.gz", "--out", "out2", "--workers", "1"])


def test_files_of_somebody_else_stay(place, tokenizer):
    write([sample(n, tokenizer) for n in range(4)])
    Path("out").mkdir()
    Path("out/train.jsonl").write_text("mine\n")
    Path("out/notes.txt").write_text("mine too\n")
    with pytest.raises(InputError, match="out/train.jsonl: the file was not written by this project"):
        run()
    assert Path("out/train.jsonl").read_text() == "mine\n"
    Path("out/train.jsonl").unlink()
    files.release("out")  # as the end of a process does
    run()
    run()
    assert Path("out/notes.txt").read_text() == "mine too\n"


def test_killed_at_any_moment_the_outputs_are_all_old_or_all_new(place, tokenizer):
    write([sample(n, tokenizer) for n in range(40)])
    run("--eval-share", "0.2")
    names = ("train.jsonl", "eval.jsonl", "counts.json", "report.md", "lengths.png")

    def state() -> list[bytes]:
        return [Path("out", name).read_bytes() for name in names]

    old = state()
    write([sample(n, tokenizer) for n in range(40, 140)])
    dice, fork = random.Random(1), multiprocessing.get_context("fork")
    for _ in range(8):
        child = fork.Process(target=quietly)
        child.start()
        time.sleep(dice.uniform(0.0, 0.5))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        now = state()
        rows = {name: text.count(b"\n") for name, text in zip(names, now, strict=True)}
        assert now == old or rows["train.jsonl"] + rows["eval.jsonl"] == 100
        for text in now[:2]:
            assert all(json.loads(line) for line in text.splitlines())
    counts = run("--eval-share", "0.2")
    assert counts["read"] == 100 and sorted(os.listdir("out")) == sorted([*names, "run.json"])


def quietly() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    run("--eval-share", "0.2")


def test_names_of_sources_are_names_whatever_they_look_like(place, tokenizer, capfd):
    write([sample(n, tokenizer, source=name) for n, name in enumerate(["a$b_{$", "$", "数学", "_x"])])
    assert run()["train"]["samples"] == 4
    assert "Glyph" not in capfd.readouterr().err
