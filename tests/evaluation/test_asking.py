"""Asking a backend: chat template, second turns, resuming, failures; against a stand-in server."""

import asyncio
import json
import threading
import time

import pytest
from helpers.stand_in import StandIn, accounting, answer_ids, free_port
from helpers.tiny import chatml_tokenizer

from evaluation import asking, backends
from evaluation.answers import Answers
from evaluation.asking import Prompts, Settings
from evaluation.backends import BackendError, Server
from evaluation.tasks import TASKS
from fastmtp.chat import prompt_ids
from fastmtp.cli import InputError

QUESTIONS = [["what is red"], ["what is blue"], ["what is green"], ["what is w9"]]


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def collect(server, tokenizer, path, task="nq_qa", questions=QUESTIONS, steps=0, parallel=1, timeout=20.0):
    async def ask():
        answers = Answers(path, {"steps": steps}, "--answer-file")
        prompts = Prompts(tokenizer, TASKS[task])
        try:
            async with Server(server.url, timeout) as backend:
                return await asking.collect(
                    backend, prompts, questions, Settings(30), answers, steps, parallel
                )
        finally:
            answers.close()

    return asyncio.run(ask())


def test_answers_go_through_the_chat_template_and_keep_the_engines_accounting(tokenizer, tmp_path):
    with StandIn(num_steps=3) as server:
        answers = collect(server, tokenizer, tmp_path / "a.jsonl", steps=3)
        warm_up, first = server.bodies[0], server.bodies[2]
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "what is red"}])
    assert first["input_ids"] == ids and warm_up["sampling_params"]["max_new_tokens"] == asking.WARM_UP_TOKENS
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
    with StandIn(fault=lambda n, _: fault if n >= 4 else None) as server:
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


TEMPLATES = {
    "refuses a system turn": "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}[{{ m.role }}] {{ m.content }} {% endfor %}",
    "leaves it out": "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "wants user first": "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}",
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_template_without_a_system_role_gets_the_system_text_before_the_question(name):
    tokenizer, task = chatml_tokenizer(), TASKS["livecodebench"]
    tokenizer.chat_template = TEMPLATES[name]
    messages = Prompts(tokenizer, task).messages(["Print one.", "Now two."], ["done"])
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == f"{task.system}\n\nPrint one." and messages[2]["content"] == "Now two."


def test_a_template_with_a_system_role_gets_a_system_turn(tokenizer):
    messages = Prompts(tokenizer, TASKS["livecodebench"]).messages(["Print one."])
    assert [m["role"] for m in messages] == ["system", "user"]


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('never') }}", "{% for %}", "hello", " ", "{{ 1/0 }}"]
)
def test_no_usable_template_is_one_line(template):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    for task in ("nq_qa", "livecodebench"):
        with pytest.raises(InputError, match="chat template") as caught:
            Prompts(tokenizer, TASKS[task])
        assert "\n" not in str(caught.value)


def test_questions_are_measured_before_anything_is_asked():
    tokenizer = chatml_tokenizer()
    prompts = Prompts(tokenizer, TASKS["mt_bench"])
    fine = [["Name a river.", "Now a lake."]]
    prompts.check(fine, 512, "q.jsonl")
    prompts.check([["the cat " * 400]], None, "q.jsonl")  # a context that nobody knows
    for question in ("the cat " * 400, "x" * 200_000):
        with pytest.raises(InputError, match=r"q.jsonl: question 2 has \d+ .*the model's context"):
            prompts.check([*fine, [question]], 512, "q.jsonl")
    tokenizer.chat_template = "{{ messages[0].content }}{% if messages|length > 2 %} more{% endif %}"
    with pytest.raises(InputError, match="question 1 has a user message that the chat template leaves out"):
        Prompts(tokenizer, TASKS["mt_bench"]).check([["Name it.", "Now."]], 512, "q.jsonl")


def test_a_question_that_the_server_refuses_does_not_keep_the_others_from_being_asked(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    with StandIn(fault=lambda n, _: "400" if n in (1, 4) else None) as server:  # the first is a warm-up
        with pytest.raises(
            BackendError, match="^1 of 4 questions of .* refused, the first .*HTTP 400"
        ) as caught:
            collect(server, tokenizer, path)
    assert "\n" not in str(caught.value) and len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("passes", [1000, 60])
def test_verify_passes_that_cannot_be_are_not_believed(passes, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.stand_in.accounting", lambda tokens, steps: (passes, [0] * (steps + 1)))
    with StandIn(num_steps=3) as server, pytest.raises(BackendError, match=f"reports {passes} verify passes"):
        collect(server, tokenizer, tmp_path / "a.jsonl", steps=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output_ids": ["a"]}, "no token ids"),
        ({"output_ids": [-1]}, "no token ids"),
        ({"output_ids": [1.5]}, "no token ids"),
    ],
)
def test_an_answer_that_is_no_tokens_is_refused(change, message):
    meta = {"completion_tokens": 1, "finish_reason": {"type": "stop"}}
    last = {"output_ids": [7], "text": "red", "meta_info": meta} | change
    with pytest.raises(BackendError, match=message):
        backends._turn(last, "http://x", 1, 0.1, 0.2, 0.0)


def test_a_server_without_a_tokenizer_is_named(tokenizer, tmp_path):
    with (
        StandIn(fault=lambda n, _: "no text") as server,
        pytest.raises(BackendError, match="no text; start it"),
    ):
        collect(server, tokenizer, tmp_path / "a.jsonl")


def test_verify_passes_of_zero_beside_many_tokens_are_not_believed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.stand_in.accounting", lambda tokens, steps: (0, [0] * (steps + 1)))
    with StandIn(num_steps=3) as server, pytest.raises(BackendError, match="no verify passes"):
        collect(server, tokenizer, tmp_path / "a.jsonl", steps=3)


def test_half_a_character_in_an_answer_does_not_end_the_run(tokenizer, tmp_path, monkeypatch):
    async def ask(*_, **__):
        last = {
            "output_ids": [7],
            "text": "red \ud83d",
            "meta_info": {"completion_tokens": 1, "finish_reason": {"type": "stop"}},
        }
        return backends._turn(last, "u", 1, 0.1, 0.2, 0.0)

    monkeypatch.setattr(Server, "ask", ask)
    with StandIn() as server:
        rows = collect(server, tokenizer, tmp_path / "a.jsonl")
    assert rows[0]["turns"][0]["text"] == "red ?"


@pytest.fixture
def uvicorn_server():
    """A real uvicorn that closes a connection after one idle second; counts the requests it answers."""
    uvicorn = pytest.importorskip("uvicorn")
    served = []

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        served.append(scope["path"])
        replies = {
            "/model_info": {"model_path": "m"},
            "/server_info": {"version": "0.5.17", "dtype": "bfloat16"},
            "/flush_cache": {},
        }
        data = json.dumps(replies.get(scope["path"], {})).encode()
        if scope["path"] == "/generate":
            meta = {"completion_tokens": 1, "finish_reason": {"type": "stop"}}
            data = b"data: " + json.dumps({"output_ids": [7], "text": "red", "meta_info": meta}).encode()
            data += b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": data})

    config = uvicorn.Config(app, port=free_port(), timeout_keep_alive=1, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{config.port}", served
    server.should_exit = True
    thread.join()


def test_a_connection_that_the_server_closed_while_idle_is_made_anew(uvicorn_server):
    url, served = uvicorn_server

    async def ask():
        async with Server(url, 10) as backend:
            await backend.info()
            time.sleep(1.5)  # a tokenizer loads: this process does nothing else, and the server hangs up
            first = await backend.ask([5], 4)
            await asyncio.gather(*(backend.ask([5], 4) for _ in range(8)))
            time.sleep(1.5)  # eight connections are dead now
            await asyncio.gather(*(backend.ask([5], 4) for _ in range(8)))
            return first

    assert asyncio.run(ask()).output_ids == [7] and served.count("/generate") == 17
