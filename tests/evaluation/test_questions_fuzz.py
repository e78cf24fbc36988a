"""Questions of any type and shape: asked whole or refused by line, no traceback and no row lost."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation.questions import load_questions
from evaluation.tasks import TASKS
from fastmtp.cli import InputError

NAMES = ("turns", "prompt", "problem", "question", "question_content", "starter_code", "A", "B", "C", "D")
NAMES += ("subject", "system", "options", "messages", "category")
texts = st.text(max_size=12) | st.sampled_from(["\ud800", " ", "What is red?"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)
rows = st.dictionaries(st.sampled_from(NAMES), values, max_size=5)


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(rows, min_size=1, max_size=3))
def test_every_row_is_asked_or_refused_by_line(name, content, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    try:
        questions = load_questions(TASKS[name], path, 80)
    except InputError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)
        return
    assert len(questions) == len(content)
    assert all(isinstance(turn, str) and turn.strip() for turns in questions for turn in turns)
    json.dumps(questions, ensure_ascii=False).encode("utf-8")  # no half characters reach a server
