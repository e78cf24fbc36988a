"""Benchmarks' prompts, asking, resuming, failures: against a stand-in server on loopback (tests/stand_in.py)."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.stand_in import StandIn, accounting, answer_ids
from helpers.tiny import chatml_tokenizer

from evaluation import harness
from evaluation.backends import BackendError, Server
from evaluation.harness import Settings
from evaluation.nq_qa import bench_sglang_eagle as nq_qa
from evaluation.plan import TASKS, parse_tasks, question_file
from evaluation.questions import load_questions
from fastmtp.chat import prompt_ids
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chatml_tokenizer().save_pretrained(folder)
    found = harness.load_tokenizer(str(folder))
    found.folder = str(folder)
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def collect(
    server, tokenizer, path, task="nq_qa", questions=None, steps=0, parallel=1, arm="baseline", timeout=20.0
):
    questions = questions or [row["turns"] for row in ROWS["nq_qa"]] + [["what is green"], ["what is w9"]]

    async def ask():
        async with Server(server.url, timeout) as backend:
            settings = Settings(task, arm, "m", max_gen_length=30)
            return await harness.collect(
                backend, tokenizer, TASKS[task], questions, settings, path, steps, parallel
            )

    return asyncio.run(ask())


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
            "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n一加一等于____。\nA. 一\nB. 二\nC. 三\nD. 四\n"
        ]


def test_question_files_that_do_not_fit_are_named(tmp_path):
    path = write(tmp_path / "q.jsonl", [ROWS["math_500"][0], {"other": 1}])
    with pytest.raises(InputError, match=r"q.jsonl:2: no field 'problem'"):
        load_questions(TASKS["math_500"], path, 80)
    with pytest.raises(InputError, match=r"q.jsonl:1: an empty"):
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


def test_answers_go_through_the_chat_template_and_keep_the_engines_accounting(tokenizer, tmp_path):
    with StandIn(num_steps=3) as server:
        answers = collect(server, tokenizer, tmp_path / "a.jsonl", steps=3, arm="fastmtp:3")
        warm_up, first = server.bodies[0], server.bodies[2]
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "what is red"}])
    assert (
        first["input_ids"] == ids and warm_up["sampling_params"]["max_new_tokens"] == harness.WARM_UP_TOKENS
    )
    assert server.flushed == 1, "the cache is emptied once, after the warm-up"
    turn = answers[0]["turns"][0]
    expected, finish = answer_ids(ids, 30)
    assert (turn["output_ids"], turn["finish"], turn["prompt_tokens"]) == (expected, finish, len(ids))
    assert (turn["verify_passes"], turn["histogram"]) == accounting(len(expected), 3)
    assert 0 < turn["first_s"] <= turn["latency_s"] and turn["first_tokens"] == 1
    assert len(server.bodies) == 4 + 2, "warm-up is asked but not kept"
    assert len(answers) == 4


def test_the_second_turn_follows_the_first_answer(tokenizer, tmp_path):
    with StandIn() as server:
        answers = collect(
            server, tokenizer, tmp_path / "a.jsonl", "mt_bench", [["what is red", "what is blue"]]
        )
        second = server.bodies[-1]["input_ids"]
    said = answers[0]["turns"][0]["text"]
    messages = [
        {"role": "user", "content": "what is red"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "what is blue"},
    ]
    assert second == prompt_ids(tokenizer, messages) and len(answers[0]["turns"]) == 2


def test_a_killed_run_asks_nothing_twice(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    with StandIn(fault=lambda n, _: "500" if n == 5 else None) as server:
        with pytest.raises(BackendError, match="HTTP 500: Internal Server Error"):
            collect(server, tokenizer, path)
    kept = path.read_text().splitlines()
    assert len(kept) == 2, "two warm-ups and two answers before the fifth request failed"
    path.write_text(
        "\n".join(kept) + '\n{"question": "cut sho'
    )  # what a SIGKILL in the middle of a write leaves
    with StandIn() as server:
        answers = collect(server, tokenizer, path)
        assert len(server.bodies) == 2 + 2
    assert len(answers) == 4 and len(path.read_text().splitlines()) == 4
    with StandIn() as server:
        assert collect(server, tokenizer, path) == answers
        assert server.bodies == [], "a finished run asks nothing, not even the warm-up"


def test_sigkill_in_the_middle_loses_and_repeats_nothing(tokenizer, tmp_path):
    questions = write(tmp_path / "q.jsonl", [{"turns": [f"what is w{n}"]} for n in range(6, 18)])
    path = tmp_path / "a.jsonl"
    with StandIn(fault=lambda n, _: "slow") as server:
        host, port = server.url.rsplit(":", 1)
        given = [
            "--question-file",
            str(questions),
            "--host",
            host,
            "--port",
            port,
            "--model",
            tokenizer.folder,
        ]
        given += ["--answer-file", str(path), "--result-file", str(tmp_path / "r")]
        line = [sys.executable, "-m", "evaluation.nq_qa.bench_sglang_eagle", *given]
        process = subprocess.Popen(line, cwd=Path(__file__).parents[2])
        while not path.exists() or path.read_text().count("\n") < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        finished = {
            tuple(answer["turns"][0]["output_ids"])
            for answer in map(json.loads, path.read_text().splitlines())
        }
        before = len(server.bodies)
        nq_qa.main(given)
        # The rest, two warm-ups; the question that was in flight is asked again, for nobody heard its answer.
        assert len(server.bodies) - before == 12 - len(finished) + 2
    assert len(path.read_text().splitlines()) == 12
    assert json.loads((tmp_path / "r").read_text())["num_questions"] == 12


def test_answers_of_other_settings_are_never_mixed_in(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    with StandIn() as server:
        collect(server, tokenizer, path)
        with pytest.raises(InputError, match=r"a.jsonl:1: made by another model, arm or setting"):
            collect(server, tokenizer, path, arm="fastmtp:3")


def test_parallel_requests_give_the_same_answers_in_order(tokenizer, tmp_path):
    questions = [[f"what is w{n}"] for n in range(6, 40)] + [["what is w6"]]
    with StandIn() as server:
        one = collect(server, tokenizer, tmp_path / "1.jsonl", questions=questions)
        many = collect(server, tokenizer, tmp_path / "8.jsonl", questions=questions, parallel=8)
    assert [a["turns"][0]["output_ids"] for a in one] == [a["turns"][0]["output_ids"] for a in many]
    assert len(one) == 34, "a question that stands there twice counts once"


@pytest.mark.parametrize(
    "fault, message",
    [
        ("500", "HTTP 500"),
        ("malformed", "no meta_info.completion_tokens"),
        ("abort", "aborted: out of memory"),
        ("cut", "ended before the answer did"),
        ("drop", "the server is gone"),
        ("hang", "no answer within 0.5 s"),
    ],
)
def test_each_failure_is_one_clear_line_and_finished_answers_stay(fault, message, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    with StandIn(fault=lambda n, _: fault if n == 4 else None) as server:
        with pytest.raises(BackendError, match=message) as caught:
            collect(server, tokenizer, path, timeout=0.5)
    assert "\n" not in str(caught.value)
    assert len(path.read_text().splitlines()) == 1


def test_a_server_that_is_not_there(tokenizer, tmp_path):
    with StandIn() as server:
        pass
    with pytest.raises(BackendError, match="gone or was never there"):
        collect(server, tokenizer, tmp_path / "a.jsonl")


def test_a_server_that_drafts_otherwise_than_the_arm_says(tokenizer, tmp_path):
    with StandIn(num_steps=3) as server:
        with pytest.raises(BackendError, match="--no-spec"):
            collect(server, tokenizer, tmp_path / "1.jsonl")
        with pytest.raises(BackendError, match="accepted 3 drafts in an arm of 2"):
            collect(server, tokenizer, tmp_path / "2.jsonl", steps=2)
    with StandIn() as server:
        with pytest.raises(BackendError, match="without speculation"):
            collect(server, tokenizer, tmp_path / "3.jsonl", steps=3)


def bench(server, tokenizer, tmp_path, *more):
    host, port = server.url.rsplit(":", 1)
    questions = write(tmp_path / "q.jsonl", ROWS["nq_qa"])
    given = ["--question-file", str(questions), "--host", host, "--port", port, "--model", tokenizer.folder]
    files = [
        "--answer-file",
        str(tmp_path / f"{server.num_steps}.jsonl"),
        "--result-file",
        str(tmp_path / "r.jsonl"),
    ]
    nq_qa.main(
        [*given, *files, "--num-questions", "80", "--temperature", "0", "--max-gen-length", "30", *more]
    )


def test_the_benchmarks_command_line_writes_contract_lines(tokenizer, tmp_path, capsys):
    with StandIn() as server:
        bench(server, tokenizer, tmp_path)
    with StandIn(num_steps=2, token_map="/maps/en_32k.pt") as server:
        bench(server, tokenizer, tmp_path)
        bench(server, tokenizer, tmp_path)  # again: the line is replaced, not doubled
    plain, spec = [json.loads(row) for row in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (plain["arm"], plain["num_steps"], plain["accept_length"]) == ("baseline", 0, 1.0)
    assert (spec["arm"], spec["num_steps"], spec["token_map"]) == ("fastmtp:2+en_32k", 2, "/maps/en_32k.pt")
    assert spec["accept_length"] > 1 and len(spec["position_rates"]) == 2
    assert spec["speedup"] == pytest.approx(spec["throughput"] / plain["throughput"])
    assert spec["environment"]["versions"]["sglang"] == "0.5.17"
    assert spec["config"]["questions"] == {"file": "q.jsonl"}
    assert "accept length" in capsys.readouterr().out


def test_a_failing_benchmark_exits_with_1_and_one_line(tokenizer, tmp_path):
    with StandIn(fault=lambda n, _: "500") as server:
        with pytest.raises(SystemExit) as caught:
            bench(server, tokenizer, tmp_path)
    assert isinstance(caught.value.code, str) and "the same command continues" in caught.value.code
    assert not (tmp_path / "r.jsonl").exists()
    with StandIn() as server, pytest.raises(InputError, match="--parallel must be at least 1, not 0"):
        bench(server, tokenizer, tmp_path, "--parallel", "0")
