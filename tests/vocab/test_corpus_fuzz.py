"""Rows of any type and shape as a corpus: counted, or refused by name; no traceback."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtp.cli import InputError
from fastmtp.vocab.corpus import Row, answers

NAMES = ("messages", "output_ids", "text", "response", "lang", "role", "content", "token_ids")
texts = st.text(max_size=12) | st.sampled_from(["\ud800", "", "assistant", "user"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | texts, inner, max_size=3)
    ),
    max_leaves=8,
)
rows = st.dictionaries(st.sampled_from(NAMES), values, max_size=4) | values


@settings(max_examples=400, deadline=None)
@given(rows, st.sampled_from([None, "text", "messages", "response", "output_ids"]))
def test_every_row_is_counted_or_refused_by_name(content, column):
    try:
        found = answers(Row("rows.jsonl:7", json.dumps(content).encode()), column)
    except InputError as error:
        assert str(error).startswith("rows.jsonl:7")  # cli prints it on one line
        return
    for answer in found:
        assert answer.text is None or answer.text.encode("utf-8") is not None
        assert answer.ids is None or all(type(i) is int for i in answer.ids)
