"""The readers of prompts and of strict YAML: what does not fit is one line that names it."""

import json
from pathlib import Path

import pytest

from fastmtp import distill
from fastmtp.cli import InputError
from fastmtp.data.prompts import listed_rows, read_prompts
from fastmtp.data.sources import DataConfig
from fastmtp.formats.yaml_file import load_yaml, read_mapping


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": None}, "no prompt"),
        ({"prompt": 5}, "`prompt` must be a text, not a number"),
        ({"prompt": ["a"]}, "`prompt` must be a text, not a list"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 needs a text as 'content', not null"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "role 'tool'.*tool use is not supported"),
        ({"messages": {"role": "user"}}, "must be a list"),
        ({"prompt": "a", "tools": [{}]}, "`tools` is not supported"),
        ({"prompt": "a", "images": ["x"]}, "`images` is not supported"),
        ({"prompt": "a", "id": {"n": 1}}, "'id' must be a text, not an object"),
        ({"prompt": "a", "lang": True}, "'lang' must be a text, not true or false"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "is an answer",
        ),
    ],
)
def test_read_prompts_names_the_line(tmp_path, row, words):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"p.jsonl:2: .*{words}"):
        read_prompts(path)


def test_half_an_emoji_in_any_string_is_named(tmp_path, base_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for row in (
        {"id": "\ud83d", "prompt": "x"},
        {"prompt": "x", "source": "\udc00"},
        {"prompt": "x", "a": ["\ud800"]},
    ):
        Path("p.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError, match="p.jsonl:1: text that is not valid UTF-8"):
            distill.main(["--model", str(base_folder), "--prompts", "p.jsonl", "--out", "o.jsonl"])


@pytest.mark.parametrize("value", [None, 7, ["x"], {"a": 1}])
@pytest.mark.parametrize("column", ["instruction", "input"])
def test_a_column_that_holds_no_text_is_named(tmp_path, monkeypatch, column, value):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": "what?", "input": ""}, {"instruction": "who?", "input": "me"} | {column: value}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "{name: s, category: c, licence: x, path: rows.jsonl, prompt: instruction, extra: input}"
    Path("list.yaml").write_text(f"sources: [{source}]\n")
    chats = listed_rows(load_yaml("list.yaml", DataConfig), "list.yaml", 0)
    if (column, value) == ("input", None):  # nothing to append
        assert [row["messages"][0]["content"] for _, row in chats()] == ["what?", "who?"]
        return
    with pytest.raises(InputError, match=f"rows.jsonl:2: column '{column}' must hold a text"):
        list(chats())


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\na: 2", "x.yaml:2: not YAML .the key 'a' is written twice"),
        ("a: [", "x.yaml:1: not YAML"),
        ("a: 2026-13-45", "x.yaml: a value is not valid YAML"),
        ("- a", "x.yaml: expected a mapping of keys to values, found list"),
        ("", "x.yaml: expected a mapping of keys to values, found nothing"),
        ("1: a", "x.yaml: the key 1 is not a text"),
        ('a: "\\ud83d"', "x.yaml: not UTF-8 text"),
        ("\x00", "x.yaml.*: not YAML"),
    ],
)
def test_yaml_that_is_no_mapping_is_named(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        read_mapping(path)
    assert "\n" not in str(error.value)


def mix(tmp_path, shares="{g: 0.5, m: 0.5}") -> Path:
    """A list of two sources of one category, 30 and 10 rows, and one of another, 4 rows."""
    sources = []
    for name, category, rows in (("a", "g", 30), ("b", "g", 10), ("c", "m", 4)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt": f"{name}{n}", "response": "x"}) + "\n" for n in range(rows))
        )
        sources.append(f"{{name: {name}, category: {category}, licence: x, path: {path}, prompt: prompt}}")
    listed = tmp_path / "list.yaml"
    listed.write_text(f"shares: {shares}\nsources: [{', '.join(sources)}]\n")
    return listed


def asked(listed: Path, limit: int | None) -> list[str]:
    rows = listed_rows(load_yaml(listed, DataConfig), str(listed), 0, limit)
    return [row["messages"][0]["content"] for _, row in rows()]


def test_a_limit_takes_prompts_by_the_shares_of_the_list(tmp_path):
    listed = mix(tmp_path)
    few = asked(listed, 8)
    assert sorted(text[0] for text in few) == list("aaabcccc")
    assert few != [f"a{n}" for n in range(3)] + ["b0", "c0", "c1", "c2", "c3"]  # at random, not the first
    more = asked(listed, 24)  # of c there is no more: what it lacks goes to the others
    assert sorted(text[0] for text in more) == list("a" * 15 + "b" * 5 + "c" * 4)
    assert {*few} <= {*more} and few == asked(listed, 8)
    assert asked(listed, 100) == asked(listed, None) and len(asked(listed, None)) == 44


def test_a_limit_without_shares_takes_rows_alike(tmp_path):
    assert sorted(text[0] for text in asked(mix(tmp_path, "{}"), 22)) == list("a" * 15 + "b" * 5 + "c" * 2)
