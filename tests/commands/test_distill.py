"""The distiller against a stand-in server: one good line a prompt, whatever fails."""

import json
import os
import time
from pathlib import Path

import pytest
from helpers.distilling import ask, asked, lines, run
from helpers.stand_in import StandIn, answer_ids

from fastmtp import distill
from fastmtp.chat import prompt_ids
from fastmtp.cli import InputError
from fastmtp.data import servers as distill_server
from fastmtp.data.servers import retry_after
from fastmtp.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("hurry")


def test_a_server_answers_every_prompt_once_with_its_exact_tokens(place, tokenizer):
    with StandIn() as server:
        run(server=server)
    rows = lines()
    assert sorted(map(asked, rows)) == sorted(f"what is {n} plus {n}?" for n in range(30))
    for row in rows:
        ids = prompt_ids(tokenizer, row["messages"][:1])
        expected, finish = answer_ids(ids, 64)
        assert row["prompt_ids"] == ids and row["finish"] == finish == "stop"
        assert row["output_ids"] == row["messages"][1]["token_ids"] == [*expected, tokenizer.eos_token_id]
        assert row["messages"][1]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert (row["source"], row["lang"]) == ("prompts", "en") and "retokenised" not in row
    sent = server.bodies[0]["sampling_params"]
    assert (sent["temperature"], sent["top_k"], sent["top_p"], sent["max_new_tokens"]) == (0.6, 20, 0.95, 64)
    assert sent["stop_token_ids"] == [tokenizer.eos_token_id]
    assert sorted(os.listdir()) == ["model", "out.jsonl", "out.jsonl.run.json", "prompts.jsonl"]


def test_what_was_answered_is_not_asked_again_and_what_is_no_longer_asked_goes(place):
    with StandIn() as server:
        run(server=server)
        first = {asked(row): row for row in lines()}
        run(server=server)
        assert len(server.bodies) == 30
        ask("a new one", *(f"what is {n} plus {n}?" for n in range(10, 30)))
        run(server=server)
        assert len(server.bodies) == 31
        rows = lines()
        assert len(rows) == 21 and all(row == first.get(asked(row), row) for row in rows)
        run("--temperature", "0", "--limit", "3", server=server)
        assert (
            server.bodies[-1]["sampling_params"]["temperature"] == 0.0
            and "top_k" not in server.bodies[-1]["sampling_params"]
        )
        assert len(server.bodies) == 34 and len(lines()) == 3


def test_the_same_prompt_twice_is_two_lines(place):
    ask("what", {"prompt": "what", "id": "second"}, "else")
    with StandIn() as server:
        run(server=server)
        run(server=server)
    assert sorted(map(asked, lines())) == ["else", "what", "what"] and len(server.bodies) == 3
    assert len({row["id"] for row in lines()}) == len({row["key"] for row in lines()}) == 3


def test_every_answer_of_a_chat_is_redone_in_order_and_kept_exactly(place, tokenizer):
    messages = [
        {"role": "system", "content": "You are"},
        {"role": "user", "content": "what is two"},
        {"role": "assistant", "content": "the file's own answer"},
        {"role": "user", "content": "and four"},
    ]
    ask({"id": "chat", "source": "chats", "lang": "en", "messages": messages})
    with StandIn() as server:
        run(server=server)
    first, second = (body["input_ids"] for body in server.bodies)
    (row,) = lines()
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    answer = row["messages"][2]["token_ids"]
    assert second[: len(first) + len(answer)] == first + answer, "no answer is tokenised again"
    assert (
        tokenizer.decode(second[len(first) + len(answer) :])
        == "\n<|im_start|>user\nand four<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row["prompt_ids"] == second and row["output_ids"] == row["messages"][4]["token_ids"]
    assert "own answer" not in json.dumps(row) and row["finish"] == "stop"


def test_a_chat_with_one_answer_that_was_cut_is_cut(place):
    turn = [{"role": "user", "content": "one"}, {"role": "assistant", "content": ""}]
    ask({"messages": [*turn, {"role": "user", "content": "two"}]})
    with StandIn() as server:
        tokenizer = load_tokenizer("model")
        first = answer_ids(prompt_ids(tokenizer, turn[:1]), 64)[0]
        run("--max-new-tokens", str(len(first) - 1), server=server)
        (row,) = lines()
        assert row["finish"] == "length" and len(row["messages"][1]["token_ids"]) == len(first) - 1


@pytest.mark.parametrize("fault", ["429", "500", "drop", "cut", "abort"])
def test_failures_that_pass_are_tried_again(place, fault):
    with StandIn(fault=lambda n, _: fault if n % 4 == 0 else None) as server:
        run("--in-flight", "8", server=server)
    assert (
        len(lines()) == len({row["key"] for row in lines()}) == 30 and not Path("out.failed.jsonl").exists()
    )
    assert 30 < len(server.bodies) <= 45


def test_a_server_that_hangs_is_left_after_the_time_limit(place):
    ask("one", "two")
    with StandIn(fault=lambda n, _: "hang" if n == 1 else None) as server:
        run("--timeout", "0.3", server=server)
    assert len(lines()) == 2 and len(server.bodies) == 3


def test_of_two_servers_the_good_one_ends_up_with_the_work(place):
    with StandIn() as good, StandIn(fault=lambda n, _: "500") as bad:
        run("--in-flight", "4", "--server", good.url, bad.url)
    assert len(lines()) == 30 and len(good.bodies) == 30


def test_what_fails_for_good_is_recorded_and_tried_by_the_next_run(place, tokenizer):
    bad = {"what is 3 plus 3?": "400", "what is 4 plus 4?": "500"}

    ids = {text: prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in bad}
    with StandIn() as server:
        server.fault = lambda n, _: next(
            (bad[t] for t in bad if server.bodies[n - 1]["input_ids"] == ids[t]), None
        )
        with pytest.raises(
            SystemExit, match="2 of [0-9]+ prompts got no answer.*failed.jsonl lists them"
        ) as end:
            run("--in-flight", "1", server=server)
        assert isinstance(end.value.code, str)  # exit code 1
        assert len(lines()) == 28 and len(server.bodies) == 28 + 1 + distill_server.ATTEMPTS
        failed = {asked(row): row["reason"] for row in lines("out.failed.jsonl")}
        assert set(failed) == set(bad)
        assert "HTTP 400" in failed["what is 3 plus 3?"] and "6 attempts" in failed["what is 4 plus 4?"]
        bad.clear()
        before = len(server.bodies)
        run(server=server)
    assert len(lines()) == 30 and len(server.bodies) == before + 2 and not Path("out.failed.jsonl").exists()


def test_a_server_that_is_gone_ends_the_run_and_loses_nothing(place):
    ask(*(f"number {n}" for n in range(200)))
    with StandIn(fault=lambda n, _: None if n <= 20 else "drop") as server:
        with pytest.raises(SystemExit, match="in a row got no answer.*same command continues"):
            run("--in-flight", "4", server=server)
        assert not Path("out.jsonl").exists()
        server.fault, before = lambda n, _: None, len(server.bodies)
        run("--in-flight", "4", server=server)
    asked = len(server.bodies) - before
    assert len(lines()) == 200 and 180 <= asked <= 184  # the first run's four in flight may arrive late


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a"}\n{"prompt": "b', "prompts.jsonl:2"),
        ('{"prompt": "a"}\n{"prompt": " "}\n', "prompts.jsonl:2: message 0: an empty"),
        ('{"prompt": ""}\n', "prompts.jsonl:1: no prompt"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "prompts.jsonl:1: no prompt"),
        ('{"messages": [{"role": "user", "content": null}]}\n', "prompts.jsonl:1: message 0 needs a text"),
        ('{"messages": "hello"}\n', "prompts.jsonl:1: `messages` must be a list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', "prompts.jsonl:1: .*'robot'"),
        ('{"prompt": "\\ud800"}\n', "prompts.jsonl:1: text that is not valid UTF-8"),
        ("", "no prompts"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_asked(place, content, message):
    Path("prompts.jsonl").write_text(content)
    with StandIn() as server, pytest.raises(InputError, match=message):
        run(server=server)
    assert server.bodies == [] and not Path("out.jsonl").exists()


@pytest.mark.parametrize("way", ["server", "in process"])
def test_a_prompt_beyond_the_context_is_recorded_and_the_others_answered(place, way):
    ask("short", "long " * 600)
    with (
        StandIn() as server,
        pytest.raises(SystemExit, match="1 of [0-9]+ prompts got no answer.*context leaves 508"),
    ):
        run("--max-new-tokens", "4", server=server if way == "server" else None)
    (failed,) = lines("out.failed.jsonl")
    assert (
        len(lines()) == 1
        and "context leaves 508" in failed["reason"]
        and asked(failed).startswith("long long")
    )


def test_prompts_are_not_replaced_by_their_answers_and_what_goes_is_counted(place, capsys):
    (place / "p.jsonl").write_text('{"prompt": "what is red"}\n{"prompt": "what is blue", "lang": NaN}\n')
    line = ["--prompts", "p.jsonl", "--out", "o.jsonl", "--model", "model", "--device", "cpu"]
    line += ["--dtype", "float32"]
    distill.main([*line, "--max-new-tokens", "3"])
    assert {json.loads(row)["lang"] for row in (place / "o.jsonl").read_text().splitlines()} == {"en"}
    before = (place / "o.jsonl").read_bytes()
    os.link("o.jsonl", "same.jsonl")
    for prompts in ("o.jsonl", "same.jsonl"):
        with pytest.raises(InputError, match="o.jsonl: is an input of this command too"):
            distill.main([*line, "--max-new-tokens", "4", "--prompts", prompts])
    assert (place / "o.jsonl").read_bytes() == before
    distill.main([*line, "--max-new-tokens", "3", "--limit", "1"])
    assert "o.jsonl: 0 asked, 1 kept, 1 to other prompts or settings left out" in capsys.readouterr().err


def test_a_url_without_a_server_is_named(place):
    with pytest.raises(InputError, match="--server http://127.0.0.1:9: .*start the server"):
        run("--server", "http://127.0.0.1:9")
    with StandIn() as server, pytest.raises(InputError, match="http://.../v1"):
        run("--server", server.url + "/nowhere")


@pytest.mark.parametrize("gives_ids", [True, False])
def test_openai_servers_give_tokens_or_the_sample_says_that_they_were_made(place, tokenizer, gives_ids):
    ask("one")
    with StandIn() as server:
        server.gives_ids = gives_ids
        run("--server", server.url + "/v1")
    (row,) = lines()
    end = tokenizer.eos_token_id
    if gives_ids:
        assert (
            row["output_ids"] == [7, 8, end] and row["prompt_ids"] == [1, 2, 3] and "retokenised" not in row
        )
    else:
        assert row["output_ids"] == [*tokenizer("red green")["input_ids"], end] and row["retokenised"] is True
    assert server.bodies[0]["model"] == "stand-in" and server.bodies[0]["max_tokens"] == 64


def test_sampling_by_source(place):
    Path("s.yaml").write_text("maths: {temperature: 0, max_new_tokens: 9}\n")
    ask({"prompt": "a", "source": "maths"}, {"prompt": "b", "source": "talk"})
    with StandIn() as server:
        run("--sampling", "s.yaml", server=server)
        assert sorted(body["sampling_params"]["max_new_tokens"] for body in server.bodies) == [9, 64]
        for text, message in (
            ("maths: {temprature: 0}", "unknown key 'maths.temprature'"),
            ("maths: {top_p: 2}", "maths.top_p"),
        ):
            Path("s.yaml").write_text(text)
            with pytest.raises(InputError, match=f"s.yaml.*{message}"):
                run("--sampling", "s.yaml", server=server)


def test_a_data_set_list_gives_sources_and_their_sampling(place):
    rows = [{"q": f"number {n}", "more": "x" * (n % 2), "kind": "ab"[n % 2]} for n in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("list.yaml").write_text(
        """
sampling: {max_new_tokens: 50}
sources:
  - {name: some, category: c, licence: none, path: rows.jsonl, prompt: q, extra: more,
     only: {kind: [b]}, samples: 4}
  - {name: all, category: c, licence: none, lang: zh, path: rows.jsonl, prompt: q,
     sampling: {temperature: 0, max_new_tokens: 40}}
"""
    )
    with StandIn() as server:
        words = ["--model", "model", "--data", "list.yaml", "--out", "out.jsonl", "--server", server.url]
        distill.main(words)
        made = lines()
        distill.main(words)
    some = [row for row in made if row["source"] == "some"]
    assert len(made) == 24 and len(server.bodies) == 24 and len(some) == 4
    assert all(asked(row).endswith("\n\nx") for row in some)
    assert {row["lang"] for row in made if row["source"] == "all"} == {"zh"}
    assert sorted(body["sampling_params"]["max_new_tokens"] for body in server.bodies) == [40] * 20 + [50] * 4


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("2.5") == 2.5 and retry_after(None) == retry_after("soon") == retry_after("-1") == 0.0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 28 < retry_after(date) <= 30
