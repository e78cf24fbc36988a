"""Question files: every benchmark's prompts, and rows that cannot be asked whole."""

import gzip
import json

import pytest

from evaluation.plan import question_file
from evaluation.questions import load_questions
from evaluation.tasks import TASKS, parse_tasks
from fastmtp.cli import InputError

# Written for these tests, in the shape of each benchmark's file.
ROWS = {
    "mt_bench": [
        {"question_id": 1, "category": "writing", "turns": ["what is red", "what is blue"]},
        {
            "question_id": 2,
            "category": "writing",
            "turns": ["what is green", "what is red"],
            "reference": ["w7"],
        },
    ],
    "livecodebench": [
        {"question_content": "Print the sum of two numbers.", "starter_code": "", "question_id": "x1"},
        {"question_content": "Return the larger.", "starter_code": "def f(a, b):\n    ", "question_id": "x2"},
    ],
    "math_500": [
        {"problem": "What is $1+1$?", "answer": "2", "unique_id": "t/1"},
        {"problem": "What is $2+3$?", "answer": "5"},
    ],
    "nq_qa": [
        {"question_id": 1, "category": "qa", "turns": ["what is red"]},
        {"question_id": 2, "turns": ["what is blue"]},
    ],
    "nq_rag": [
        {"question_id": 3, "turns": ["w6 w7 w8\nwhat is w9"]},
        {"question_id": 4, "prompt": "w8 w9\nwhat is w6"},
    ],
    "cnn_dm": [
        {"question_id": 5, "turns": ["Summarize: w6 w7 w8"]},
        {"question_id": 6, "turns": ["Summarize: w9"]},
    ],
    "c_eval": [
        {
            "id": 0,
            "question": "下列哪个是颜色？\nA. 红\nB. 二\nC. 三\nD. 四\n",
            "category": "logic",
            "answer": "A",
        },
        {"subject": "logic", "question": "一加一等于____。", "A": "一", "B": "二", "C": "三", "D": "四"},
    ],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", list(TASKS))
def test_every_benchmarks_prompts(name, tmp_path):
    turns = load_questions(TASKS[name], write(tmp_path / f"{name}.jsonl", ROWS[name]), 80)
    assert len(turns) == 2
    expected = {
        "mt_bench": [["what is red", "what is blue"], ["what is green", "what is red"]],
        "nq_qa": [["what is red"], ["what is blue"]],
        "nq_rag": [["w6 w7 w8\nwhat is w9"], ["w8 w9\nwhat is w6"]],
        "cnn_dm": [["Summarize: w6 w7 w8"], ["Summarize: w9"]],
    }
    if name in expected:
        assert turns == expected[name]
    elif name == "math_500":
        assert turns[0][0].startswith("What is $1+1$?\n\n") and "\\boxed{}" in turns[0][0]
    elif name == "livecodebench":
        assert "standard input" in turns[0][0] and "# your program" in turns[0][0]
        assert "```python\ndef f(a, b):" in turns[1][0] and "standard input" not in turns[1][0]
    else:
        assert turns[0] == [ROWS["c_eval"][0]["question"]]
        assert turns[1] == [
            "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n一加一等于____。\n"
            "A. 一\nB. 二\nC. 三\nD. 四\n"
        ]


def test_question_files_that_do_not_fit_are_named(tmp_path):
    path = write(tmp_path / "q.jsonl", [ROWS["math_500"][0], {"other": 1}])
    with pytest.raises(InputError, match=r"q.jsonl:2: no field 'problem'"):
        load_questions(TASKS["math_500"], path, 80)
    with pytest.raises(InputError, match=r"q.jsonl:1: an empty question"):
        load_questions(TASKS["nq_qa"], write(tmp_path / "q.jsonl", [{"turns": ["  "]}]), 80)
    with pytest.raises(InputError, match="no questions"):
        load_questions(TASKS["nq_qa"], write(tmp_path / "q.jsonl", []), 80)
    assert len(load_questions(TASKS["mt_bench"], write(tmp_path / "q.jsonl", ROWS["mt_bench"]), 1)) == 1


def test_task_names_and_question_folders(tmp_path):
    assert [t.name for t in parse_tasks("all")] == list(TASKS) and len(TASKS) == 7
    with pytest.raises(InputError, match="'gsm' is not a task"):
        parse_tasks("nq_qa,gsm")
    write(tmp_path / "livecodebench_v6.jsonl", [])
    assert question_file(str(tmp_path), TASKS["livecodebench"]).name == "livecodebench_v6.jsonl"
    with pytest.raises(InputError, match="no files named cnn_dm"):
        question_file(str(tmp_path), TASKS["cnn_dm"])


REFUSED = [
    ("mt_bench", {"turns": None}, "'turns' is null"),
    (
        "mt_bench",
        {"prompt": {"user": "Name a river.", "style": "terse"}},
        "a text or a list of texts, not an",
    ),
    ("mt_bench", {"prompt": [{"role": "user", "content": "Name a river."}]}, "must be text, not an object"),
    ("mt_bench", {"turns": ["Name a river.", None]}, "must be text, not null"),
    ("mt_bench", {"turns": [7]}, "must be text, not a number"),
    ("mt_bench", {"turns": 7}, "not a number"),
    ("mt_bench", {"turns": []}, "an empty question"),
    ("mt_bench", {"turns": ["Name a river."], "prompt": "Name a lake."}, "two different questions"),
    ("mt_bench", {"turns": ["Name a river."], "system": "Be terse."}, "'system' is not asked"),
    ("mt_bench", {"turns": ["What does \ud83c mean?"]}, "not valid UTF-8"),
    ("nq_rag", {"turns": ["Which river?"], "context": "The Rhine is long."}, "'context' is not asked"),
    ("nq_qa", {"turns": ["Which river?"], "A": "Rhine", "B": "Elbe"}, "'A' is not asked"),
    ("math_500", {"problem": None}, "'problem' is null"),
    ("math_500", {"problem": " "}, "an empty question"),
    ("math_500", {"problem": ["1+1"]}, "must be text, not a list"),
    ("math_500", {"problem": True}, "must be text, not true or false"),
    ("livecodebench", {"question_content": None, "starter_code": ""}, "'question_content' is null"),
    ("livecodebench", {"question_content": "Sort.", "starter_code": 3}, "must be text, not a number"),
    ("c_eval", {"question": "哪个？", "A": "一", "B": None}, "choice B is null"),
    ("c_eval", {"question": "哪个？", "A": "一", "B": ""}, "choice B is empty"),
    ("c_eval", {"question": "哪个？", "A": "一", "C": "三"}, "choices A, C alone"),
    ("c_eval", {"question": "哪个？", "options": "一二三"}, "a list or an object of choices"),
    ("c_eval", {"question": "哪个？", "options": {"x": "一", "y": "二"}}, "must name its choices A, B"),
    ("c_eval", {"question": "哪个？", "A": "一", "B": "\udc00"}, "not valid UTF-8"),
    ("c_eval", {"question": "哪个？", "A": float("nan"), "B": "二"}, "choice A is empty"),
    ("c_eval", {"question": "哪个？", "A": "  ", "B": "二"}, "choice A is empty"),
    ("c_eval", {"question": "哪个？", "a": "一", "b": "二"}, "'a' is not asked"),
    ("c_eval", {"question": "哪个？", "option_a": "一", "option_b": "二"}, "'option_a' is not asked"),
    (
        "c_eval",
        {"question": "哪个？", "A": "一", "B": "二", "options": ["三", "五"]},
        "in 'options' and in 'A'",
    ),
    ("nq_rag", {"turns": ["Which river?"], "ctxs": ["The Rhine is long."]}, "'ctxs' is not asked"),
    ("nq_rag", {"turns": ["Which river?"], "Context": "The Rhine is long."}, "'Context' is not asked"),
    ("cnn_dm", {"turns": ["Sum it up."], "article": "A long one."}, "'article' is not asked"),
    ("mt_bench", {"turns": ["Name a river."], "tools": [{"name": "map"}]}, "'tools' is not asked"),
    ("math_500", {"problem": "1+1", "image": {"bytes": "x"}}, "'image' is not asked"),
    ("c_eval", {"question": None, "A": "一", "B": "二"}, "'question' is null"),
    ("c_eval", {"subject": 5, "question": "哪个？", "A": "一", "B": "二"}, "'subject' must be text"),
]


@pytest.mark.parametrize("task, row, reason", REFUSED)
def test_a_row_that_cannot_be_asked_whole_is_refused_by_file_and_line(task, row, reason, tmp_path):
    path = write(tmp_path / "q.jsonl", [ROWS[task][0], row])
    with pytest.raises(InputError, match=reason) as caught:
        load_questions(TASKS[task], path, 80)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


CHOICES = "\nA. 一\nB. 2\nC. 三\nD. 五\n"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"A": "一", "B": 2, "C": "三", "D": "五", "answer": "B", "explanation": ""}, CHOICES),
        ({"A": "一", "B": 2, "C": "三", "D": "五", "subject": None}, CHOICES),
        ({"options": ["一", 2, "三", "五"]}, CHOICES),
        ({"choices": {"A": "一", "B": 2, "C": "三", "D": "五"}}, CHOICES),
        ({"A": "一", "B": 2, "C": "三", "D": "五", "E": "六"}, CHOICES + "E. 六\n"),
        ({"A": "一", "B": 2, "C": "三", "D": "五", "E": None, "F": float("nan")}, CHOICES),
    ],
)
def test_c_evals_choices_are_asked_wherever_the_row_has_them(row, expected, tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": "哪一项是偶数？"} | row])
    ((asked,),) = load_questions(TASKS["c_eval"], path, 80)
    assert asked == f"以下是单项选择题，请选出其中的正确答案。\n哪一项是偶数？{expected}"


def test_what_the_question_says_already_and_a_repeated_question_are_no_fault(tmp_path, capsys):
    row = {"turns": ["Sum it up: A long one."], "article": "A long one.", "highlights": "Long."}
    path = write(tmp_path / "q.jsonl", [row, row])
    assert load_questions(TASKS["cnn_dm"], path, 80) == [row["turns"]] * 2
    assert capsys.readouterr().err == f"{path}: 1 of 2 questions are repeated and asked once\n"


def test_null_is_never_the_word_none(tmp_path):
    rows = [{"question_content": "Print the larger.", "starter_code": None}, {"question_content": "Sort."}]
    asked = load_questions(TASKS["livecodebench"], write(tmp_path / "q.jsonl", rows), 80)
    assert all("None" not in text and "# your program" in text for (text,) in asked)
    path = write(tmp_path / "q.jsonl", [{"turns": None, "prompt": ["Say a word."]}])
    assert load_questions(TASKS["mt_bench"], path, 80) == [["Say a word."]]


def test_files_with_a_byte_order_mark_and_packed_ones_are_read(tmp_path):
    text = json.dumps({"turns": ["Which river?"]}) + "\n"
    (tmp_path / "nq_qa.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_questions(TASKS["nq_qa"], tmp_path / "nq_qa.jsonl", 80) == [["Which river?"]]
    (tmp_path / "cnn_dm.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    path = question_file(str(tmp_path), TASKS["cnn_dm"])
    assert load_questions(TASKS["cnn_dm"], path, 80) == [["Which river?"]]


@pytest.mark.parametrize("text", ["", "{", "[1]\n", '{"turns": ["a"]}\n{"turns": [\n', "\x00\x00\n"])
def test_broken_files_are_one_line(text, tmp_path):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(InputError, match="q.jsonl"):
        load_questions(TASKS["nq_qa"], tmp_path / "q.jsonl", 80)


def test_a_benchmark_with_its_own_system_text_takes_files_that_name_another(tmp_path):
    """Some LiveCodeBench files carry a `system` column and a ready `question` beside the statement."""
    row = ROWS["livecodebench"][0] | {
        "system": "You write programs.",
        "question": "A question: print the sum.",
    }
    path = tmp_path / "livecodebench.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (turns,) = load_questions(TASKS["livecodebench"], path, 80)
    assert row["question_content"] in turns[0]
