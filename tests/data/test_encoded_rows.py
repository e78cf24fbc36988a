"""Rows that an unfinished run keeps: the same rows come back, and only where nothing has changed."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.data import encoded_rows
from fastmtp.data.training_rows import Rules

RULES = Rules(320, 512)


@pytest.fixture
def place(tmp_path, base_folder):
    """A model, rows of which one in three is left out, and a claimed output."""
    shutil.copytree(base_folder, tmp_path / "model")
    write(tmp_path, 9)
    files.claim(tmp_path / "out", folder=True)
    return tmp_path


@pytest.fixture
def encoded(monkeypatch) -> list:
    """Grows by one whenever rows are encoded."""
    calls, real = [], encoded_rows.read_set

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(encoded_rows, "read_set", counted)
    return calls


def write(folder, count: int, word: str = "two") -> None:
    rows = [{"query": f"what is {n}?", "response": f"it is {word}" if n % 3 else ""} for n in range(count)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(place, tokenizer, rules=RULES):
    path = encoded_rows.kept_at(place / "out", "dataset")
    rows = encoded_rows.read_kept(path, [str(place / "a.jsonl")], str(place / "model"), tokenizer, rules, 1)
    encoded_rows.keep(place / "out", {"dataset": rows})
    return rows


def test_the_same_rows_come_back(place, tokenizer, encoded):
    first, second = read(place, tokenizer), read(place, tokenizer)
    assert len(encoded) == 1 and second.facts is None
    assert first.summary() == second.summary() and first.left_out == second.left_out == 3
    assert [row is None for row in first.encoded] == [row is None for row in second.encoded]
    order = [8, 0, 4, 1]
    pairs = zip(first.sequences(order), second.sequences(order), strict=True)
    assert all(np.array_equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))
    assert {ids.dtype for ids, _ in second.sequences()} == {np.dtype(np.int32)}


def test_what_has_changed_is_encoded_again(place, tokenizer, encoded):
    read(place, tokenizer)
    write(place, 9, "six")  # the same size
    changed = read(place, tokenizer)
    assert len(encoded) == 2 and "six" in tokenizer.decode(next(changed.sequences())[0])
    read(place, tokenizer, replace(RULES, max_length=256))
    assert len(encoded) == 3
    template = place / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    read(place, tokenizer, replace(RULES, max_length=256))
    assert len(encoded) == 4
    read(place, tokenizer, replace(RULES, max_length=256))
    assert len(encoded) == 4


def test_a_torn_file_counts_as_none(place, tokenizer, encoded):
    read(place, tokenizer)
    path = encoded_rows.kept_at(place / "out", "dataset")
    whole = path.read_bytes()
    for torn in (b"", whole[: len(whole) // 2], b"something else"):
        path.write_bytes(torn)
        assert read(place, tokenizer).left_out == 3
    assert len(encoded) == 4


def test_a_finished_run_keeps_nothing_and_files_of_others_stay(place, tokenizer):
    rows = read(place, tokenizer)
    path = encoded_rows.kept_at(place / "out", "dataset")
    encoded_rows.forget(place / "out", {"dataset": rows})
    assert not path.exists()
    theirs = place / "theirs"
    theirs.mkdir()
    (theirs / path.name).write_text("precious")
    files.claim(theirs, folder=True)
    rows.facts = {"data": "x"}
    with pytest.raises(InputError, match="not written by this project"):
        encoded_rows.keep(theirs, {"dataset": rows})
    encoded_rows.forget(theirs, {"dataset": rows})
    assert (theirs / path.name).read_text() == "precious"


def test_of_several_nodes_the_first_one_writes(place, tokenizer, encoded, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    read(place, tokenizer)
    assert not encoded_rows.kept_at(place / "out", "dataset").exists()
