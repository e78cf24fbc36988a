"""Samples are read whole or refused with their line: no row vanishes, no id is taken for another."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmtp.chat import prompt_ids
from fastmtp.cli import InputError
from fastmtp.data.samples import check_measurable, read_samples

GOOD = {"prompt_ids": [5, 6], "output_ids": [7, 8, 9]}
ASKED = {"role": "user", "content": "what?"}
NO_IDS = [["7"], [7, -1], [7, True], [7, 8.0], [7, None], [[7]], [10**30], [320], [], "78", {"a": 1}, None, 7]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ids", NO_IDS, ids=str)
@pytest.mark.parametrize("name", ["prompt_ids", "output_ids"])
def test_ids_are_whole_numbers_of_the_model(tmp_path, name, ids, tokenizer):
    path = write(tmp_path / "s.jsonl", GOOD, {**GOOD, name: ids})
    with pytest.raises(InputError, match=f"s.jsonl:2: .*[`']{name}[`']"):
        read_samples(path, 320, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": 5},
        {"messages": [None]},
        {"messages": {"role": "user"}},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": ["user"], "content": "x"}]},
        {"messages": [ASKED, {"role": "assistant", "content": "quite another answer"}]},
        {"messages": [ASKED | {"content": {"token_ids": [5]}}, {"role": "assistant", "content": "x"}]},
        {"messages": [ASKED | {"content": 5}, {"role": "assistant", "content": "x"}]},
        {"source": ["a"]},
        {"lang": True},
    ],
    ids=str,
)
def test_rows_of_another_kind_are_named(tmp_path, row, tokenizer):
    path = write(tmp_path / "s.jsonl", GOOD, {**GOOD, **row})
    with pytest.raises(InputError, match="s.jsonl:2: "):
        read_samples(path, 320, tokenizer=tokenizer)


@pytest.mark.parametrize("content", [None, 4, {"token_ids": None}, {"token_ids": ["a"]}, {}], ids=str)
def test_a_curated_answer_that_is_no_text_is_named(tmp_path, content, tokenizer):
    path = write(tmp_path / "s.jsonl", {"messages": [ASKED, {"role": "assistant", "content": content}]})
    with pytest.raises(InputError, match="s.jsonl:1: "):
        read_samples(path, 320, tokenizer=tokenizer)


def test_curated_rows_are_read_like_distilled_ones(tmp_path, tokenizer):
    answer = tokenizer("two plus two is four")["input_ids"] + [tokenizer.eos_token_id]
    first = {"role": "assistant", "content": {"token_ids": answer[:3]}}
    messages = [ASKED, first, {"role": "user", "content": "and?"}]
    row = {"messages": [*messages, {"role": "assistant", "content": {"token_ids": answer}}]}
    path = write(tmp_path / "eval.jsonl", row)
    (sample,) = read_samples(path, len(tokenizer), tokenizer=tokenizer)
    assert sample["output_ids"] == answer and sample["prompt_ids"] == prompt_ids(tokenizer, messages)
    with pytest.raises(InputError, match="prompt_ids"):
        read_samples(path, len(tokenizer))


def test_missing_labels_are_empty_and_a_text_beside_its_own_ids_is_fine(tmp_path, tokenizer):
    text = "four and four is eight"
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    row = {"messages": [ASKED, {"role": "assistant", "content": text}], "prompt_ids": [5], "output_ids": ids}
    path = write(tmp_path / "s.jsonl", {**row, "source": None}, GOOD)
    samples = read_samples(path, 320, tokenizer=tokenizer)
    assert [(s["source"], s["lang"]) for s in samples] == [("", ""), ("", "")]
    assert len(read_samples(path, 320, limit=1)) == 1


def test_answers_without_a_second_token_have_no_accept_length(tmp_path):
    one = {**GOOD, "output_ids": [7]}
    with pytest.raises(InputError, match="no answer has two tokens"):
        check_measurable("x.jsonl", [one, one])
    check_measurable("x.jsonl", [one, GOOD])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "tool", 5]) | VALUES, "content": VALUES}
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "messages": st.lists(MESSAGE, max_size=3) | VALUES,
            "prompt_ids": st.lists(st.integers(-2, 330), max_size=3) | VALUES,
            "output_ids": st.lists(st.integers(-2, 330), max_size=3) | VALUES,
            "source": VALUES,
        },
    )
)
def test_any_row_is_read_or_refused_with_its_line(tmp_path, tokenizer, row):
    path = write(tmp_path / "s.jsonl", row)
    try:
        (sample,) = read_samples(path, 320, tokenizer=tokenizer)
    except InputError as error:
        assert str(error).startswith(f"{path}:1: ") and "\n" not in str(error)
    else:
        for name in ("prompt_ids", "output_ids"):
            assert sample[name] and all(type(i) is int and 0 <= i < 320 for i in sample[name])
