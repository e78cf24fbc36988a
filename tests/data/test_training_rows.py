"""Rows of all kinds through the reader of `train`: trained on as they are, or left out with a reason."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmtp.chat import IGNORE, prompt_ids
from fastmtp.cli import InputError
from fastmtp.data.training_rows import LeftOut, Rules, encode_row
from fastmtp.data.training_set import is_local, read_set, shuffled, split_count, write_set

USER, BOT = {"role": "user", "content": "what is two?"}, {"role": "assistant", "content": "two is two"}
RULES = Rules(vocab_size=320, max_length=200)


def reason(tokenizer, row, rules=RULES) -> str:
    with pytest.raises(LeftOut) as left:
        encode_row(tokenizer, row, rules)
    return str(left.value)


def chat(*answer, **more) -> dict:
    """A row of one turn, its answer changed by `answer` and the row by `more`."""
    return {"messages": [USER, BOT | (answer[0] if answer else {})]} | more


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "neither 'messages'"),
        ({"messages": None}, "neither 'messages'"),
        ({"messages": "hi"}, "not a list of objects"),
        ({"messages": []}, "not a list of objects"),
        ({"messages": [1, 2]}, "not a list of objects"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, BOT | {"role": "asistant"}]}, "unknown role"),
        ({"messages": [{"content": "x"}, BOT]}, "unknown role null"),
        ({"messages": [USER | {"content": None}, BOT]}, "'user' turn is not a text (NoneType)"),
        ({"messages": [USER | {"content": 7}, BOT]}, "'user' turn is not a text (int)"),
        ({"messages": [USER | {"content": [{"type": "text", "text": "x"}]}, BOT]}, "not a text (list)"),
        ({"messages": [USER | {"token_ids": [1]}, BOT]}, "only answers have exact ids"),
        (chat({"content": None}), "'assistant' turn is not a text"),
        (chat({"content": ""}), "no target"),
        (chat({"loss": False}), "no target"),
        (chat({"loss": "false"}), "'loss' must be"),
        (chat({"loss": 0}), "'loss' must be"),
        (chat({"loss_scale": 0.0}), "'loss_scale' in a turn"),
        (chat({"content": {"token_ids": [70, 71]}, "token_ids": [70, 72]}), "two lists"),
        (chat(functions=[{"name": "f"}]), "'functions'"),
        ({"messages": [BOT, USER, BOT]}, "begins with an answer"),
        (
            {"messages": [USER, BOT | {"tool_calls": [{"function": {}}], "loss": False}, USER, BOT]},
            "leaves out an answer's 'tool_calls'",
        ),
        (chat({"content": {"token_ids": [2]}}), "no target"),
        (chat({"content": {"token_ids": []}}), "no target"),
        (chat({"content": {"token_ids": [70, -1]}}), "outside the model's 320"),
        (chat({"content": {"token_ids": [70, 320]}}), "outside the model's 320"),
        (chat({"content": {"token_ids": [70, 71.0]}}), "not whole numbers"),
        (chat({"content": {"token_ids": [70, True]}}), "not whole numbers"),
        (chat({"content": {"token_ids": [70, "71"]}}), "not whole numbers"),
        (chat({"content": {"token_ids": [[70, 71]]}}), "not whole numbers"),
        (chat({"content": {"token_ids": "70"}}), "not a text"),
        (chat({"token_ids": [70, 71, 72, 2]}), "spell other text"),
        (chat({"content": "half \ud83d"}), "half an emoji"),
        (chat(tools="{"), "not JSON"),
        (chat(tools=["x"]), "'tools' is not a list of objects"),
        (chat(tools=[{"name": "f"}]), "leaves out the tools"),
        (chat({"tool_calls": "f"}), "'tool_calls' is not a list"),
        (chat(images=["x.png"]), "reads text alone"),
        (chat(prompt_ids=[5, 6]), "another prompt"),
        (chat(prompt_ids=[5, -6]), "outside the model"),
        (chat(output_ids=[70, 71, 2]), "spell other text"),
        ({"query": "x"}, "neither 'messages'"),
        ({"query": 5, "response": "x"}, "prompt is not a text (int)"),
        ({"query": "x", "response": ["a", "b"]}, "response is not a text (list)"),
        ({"query": "x", "response": "y", "history": "z"}, "'history'"),
        (chat({"content": "two " * 300}), "longer than max_length 200"),
    ],
)
def test_rows_that_cannot_be_trained_on(tokenizer, row, words):
    assert words in reason(tokenizer, row)


def test_a_distilled_row_keeps_its_exact_ids(tokenizer):
    """Beside its text or as output_ids of the row; nothing is tokenised again, nothing added."""
    letters = [tokenizer.convert_tokens_to_ids("Ġ" if c == " " else c) for c in BOT["content"]]
    assert tokenizer.decode(letters) == BOT["content"] and letters != tokenizer(BOT["content"])["input_ids"]
    asked = prompt_ids(tokenizer, [USER])
    for ids in (letters, letters + [tokenizer.eos_token_id]):  # cut at the limit, or finished
        expected = [(asked + ids, [IGNORE] * len(asked) + ids)]
        whole = {"prompt_ids": asked, "output_ids": ids}
        assert encode_row(tokenizer, chat({"token_ids": ids}, **whole), RULES) == expected
        assert encode_row(tokenizer, chat(**whole), RULES) == expected
        assert encode_row(tokenizer, chat({"content": {"token_ids": ids}}), RULES) == expected
    other = chat({"token_ids": letters}, output_ids=letters[:-1])
    assert "output_ids are not" in reason(tokenizer, other)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"query": "what is two?", "response": "two is two"}, {}),
        ({"prompt": "what is two?", "response": "two is two"}, {"prompt": "query"}),
        ({"prompt": "what is two?", "response": "two is two", "lang": "en"}, {}),
        ({"ask": "what is two?", "say": "two is two"}, {"ask": "query", "say": "response"}),
        ({"instruction": "what is two?", "input": "", "output": "two is two"}, {}),
        (
            {
                "conversations": [
                    {"from": "human", "value": USER["content"]},
                    {"from": "gpt", "value": BOT["content"]},
                ]
            },
            {},
        ),
        (chat({"loss": None, "loss_scale": 1.0}), {}),
        (chat(tools="", functions=[]), {}),
        ({"conversation": [{"human": USER["content"], "assistant": BOT["content"]}]}, {}),
        ({"messages": [USER | {"id": 3}, BOT | {"weight": 1}], "images": []}, {}),
    ],
)
def test_forms_of_the_same_row(tokenizer, row, columns):
    assert encode_row(tokenizer, row, Rules(320, 200, columns=columns)) == encode_row(
        tokenizer, chat(), RULES
    )


def test_system_and_history(tokenizer):
    system = {"role": "system", "content": "be short"}
    expected = encode_row(tokenizer, {"messages": [system, USER, BOT, USER, BOT]}, RULES)
    row = {"query": USER["content"], "response": BOT["content"], "system": "be short"}
    history = [[USER["content"], BOT["content"]]]
    assert encode_row(tokenizer, row | {"history": history}, RULES) == expected
    assert (
        encode_row(tokenizer, {"messages": [USER, BOT, USER, BOT], "system": "be short"}, RULES) == expected
    )
    alone = {"messages": [USER, BOT, USER, BOT]}
    assert encode_row(tokenizer, alone, Rules(320, 200, system="be short")) == expected


@pytest.mark.parametrize("cut", ["left", "right"])
def test_truncation_keeps_an_end(tokenizer, cut):
    ids, labels = encode_row(tokenizer, chat(), RULES)[0]
    part = slice(-3, None) if cut == "left" else slice(0, len(ids) - 1)
    length = len(ids[part])
    assert encode_row(tokenizer, chat(), Rules(320, length, cut)) == [(ids[part], labels[part])]
    assert "no target" in reason(tokenizer, chat(), Rules(320, 4, "right"))


def test_ids_may_differ_from_their_text_by_spaces_and_composed_accents(tokenizer):
    for text, spelt in (("two is two", " two  is two"), ("caf\u00e9 is two", "cafe\u0301 is two")):
        ids = tokenizer(spelt, add_special_tokens=False)["input_ids"]
        ((_, labels),) = encode_row(tokenizer, chat({"content": text, "token_ids": ids}), RULES)
        assert [token for token in labels if token != IGNORE] == ids


def test_a_text_beyond_all_measure_is_not_tokenised(tokenizer):
    def never(*_, **__):
        raise AssertionError

    row = {"messages": [USER | {"content": "x" * 2000}, BOT]}
    assert "longer than max_length 9" in reason(never, row, Rules(320, 9, max_chars=1000))


def lines(path, rows, opener=open, start=""):
    with opener(path, "wt", encoding="utf-8") as out:
        out.write(start + "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_of_every_kind_hold_the_same_rows(tokenizer, tmp_path):
    rows = [{"query": f"what is {n}?", "response": "it is two"} for n in range(5)]
    plain = lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    (tmp_path / "e.csv").write_text(
        "query,response\n" + "".join(f"what is {n}?,it is two\n" for n in range(5))
    )
    others = [
        lines(tmp_path / "b.jsonl", rows, start="\ufeff"),
        lines(tmp_path / "c.jsonl.gz", rows, gzip.open),
        *(str(tmp_path / name) for name in ("d.json", "e.csv")),
        lines(tmp_path / "f.json", rows),
    ]
    expected = [ids.tolist() for ids, _ in read_set([plain], tokenizer, RULES).sequences()]
    assert len(expected) == 5
    for other in others:
        assert [ids.tolist() for ids, _ in read_set([other], tokenizer, RULES).sequences()] == expected, other
    assert len(read_set([plain + "#2", *others], tokenizer, RULES).encoded) == 27


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b"[1]", "entry 1 is not an object"),
        ("a.jsonl", b'{"query": "x", "resp', "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"query": "\xff"}', "a.jsonl:1: not UTF-8"),
        ("a.jsonl", b"[1]", "a.jsonl:1: expected a JSON object"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"query": "x"}' * 99, mtime=0)[:30], "cannot be read"),
        ("a.csv", b"query,response\na\n", "a.csv:2: not as many fields"),
        ("a.csv", b"query,response\na,b,c\n", "a.csv:2: not as many fields"),
        ("a.csv", b"query,response\na,\xff\n", "not a CSV file in UTF-8"),
        ("a.csv", b"query,response\n", "no rows"),
        ("a.parquet", b"PAR1", "convert it first"),
        ("a.jsonl", b'{"messages": ' + b"[" * 100000, "a.jsonl"),
    ],
)
def test_broken_files_are_one_line(tokenizer, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        read_set([str(tmp_path / name)], tokenizer, RULES)
    assert "\n" not in str(error.value)


def test_the_summary_counts_and_names(tokenizer, tmp_path):
    rows = [chat()] * 6 + [chat({"content": ""})] * 2 + [{}] + [chat()]
    found = read_set([lines(tmp_path / "a.jsonl", rows)], tokenizer, RULES)
    assert (len(found.encoded), found.left_out) == (10, 3)
    assert found.summary().startswith("10 rows, 3 left out: 2 no target")
    assert f"(first: {tmp_path}/a.jsonl:7)" in found.summary() and "a.jsonl:9" in found.summary()


def test_many_processes_read_as_one(tokenizer, tmp_path):
    rows = [chat({"content": f"it is {n} " * (1 + n % 3)}) if n % 7 else {} for n in range(1200)]
    path = lines(tmp_path / "a.jsonl", rows)
    one, two = (read_set([path], tokenizer, RULES, count) for count in (1, 2))
    assert one.summary() == two.summary() and one.left_out == 172
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(one.sequences(), two.sequences(), strict=True))


def test_what_ms_swift_reads_is_what_was_checked(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [chat({"content": f"it is {n}"}) for n in range(9)]
    found = read_set([lines(tmp_path / "a.jsonl", rows)], tokenizer, RULES)
    order = shuffled(9, 42, 1)
    write_set(found.sequences(order), tmp_path / "set")
    read = datasets.load_from_disk(str(tmp_path / "set"))
    plain = [ids.tolist() for ids, _ in found.sequences()]
    assert read["input_ids"][:] == [plain[n] for n in order] and [len(i) for i in plain] != []
    # the order into which ms-swift shuffles one data set with its seed 42
    state = np.random.RandomState(42)
    state.randint(0, 2**31 - 1)
    seed = state.randint(0, 2**31 - 1)
    assert datasets.Dataset.from_dict({"n": range(9)}).shuffle(seed=seed)["n"][:] == order.tolist()


def test_names_of_data_sets(tmp_path):
    (tmp_path / "a#1").write_text("")
    assert split_count("x.jsonl#20") == ("x.jsonl", 20) and split_count(str(tmp_path / "a#1"))[1] is None
    assert is_local("x.jsonl") and is_local("x.csv#3") and is_local("/data/x") and is_local("./x")
    assert not is_local("AI-ModelScope/alpaca") and not is_local("hf::owner/name#500")


SCALARS = st.none() | st.booleans() | st.integers(-5, 400) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | VALUES, "content": VALUES},
    optional={
        "token_ids": st.lists(st.integers(-1, 330)) | VALUES,
        "loss": VALUES,
        "tool_calls": VALUES,
        "reasoning_content": VALUES,
        "name": VALUES,
    },
)
ROWS = st.dictionaries(st.text(max_size=5), VALUES, max_size=2) | st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, max_size=4) | VALUES},
    optional={key: VALUES for key in ("tools", "system", "output_ids", "prompt_ids", "query", "response")},
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=ROWS)
def test_any_row_is_encoded_or_left_out(tokenizer, row):
    """Never another error; and what is encoded is within the model's vocabulary and has a target."""
    try:
        sequences = encode_row(tokenizer, row, RULES)
    except LeftOut as left:
        assert "\n" not in str(left)
        return
    for ids, labels in sequences:
        assert len(ids) == len(labels) <= 200 and all(0 <= i < 320 for i in ids)
        assert any(a != IGNORE != b for a, b in zip(labels, labels[1:], strict=False))
