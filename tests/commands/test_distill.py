"""The distiller against a stand-in server, engines that are stand-ins, and in this process: one good line a
prompt, whatever fails, whenever it is killed.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.stand_in import StandIn, answer_ids

from benchmarks import distill as benchmark
from fastmtp import distill
from fastmtp.chat import prompt_ids
from fastmtp.cli import InputError
from fastmtp.data import engines, generate, journal
from fastmtp.data import servers as distill_server
from fastmtp.data.servers import retry_after
from fastmtp.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(distill_server, "PULSE", 0.0)
    monkeypatch.setattr(distill_server, "BACKOFF", 0.01)


@pytest.fixture
def place(tmp_path, base_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(base_folder, target_is_directory=True)
    ask(*(f"what is {n} plus {n}?" for n in range(30)))
    return tmp_path


def ask(*prompts: str | dict) -> None:
    rows = [p if isinstance(p, dict) else {"prompt": p} for p in prompts]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*words: str, server: StandIn | None = None) -> None:
    urls = ["--server", server.url] if server else []
    distill.main(
        [
            "--model",
            "model",
            "--prompts",
            "prompts.jsonl",
            "--max-new-tokens",
            "64",
            "--out",
            "out.jsonl",
            *urls,
            *words,
        ]
    )


def lines(path: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def asked(row: dict) -> str:
    return row["messages"][0]["content"]


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
    assert len(lines()) == 200 and len(server.bodies) - before == 180


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


def test_a_full_disk_stops_with_one_clear_line_and_loses_nothing(place, monkeypatch):
    room, real = [4000], os.write

    def write(file: int, data: bytes) -> int:
        if file < 3 or room[0] is None:
            return real(file, data)
        taken = data[: room[0]]
        room[0] -= len(taken)
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, taken)

    monkeypatch.setattr(journal.os, "write", write)
    with StandIn() as server:
        with pytest.raises(InputError, match=r"out.jsonl: the disk is full; \d+ answers are kept"):
            run("--in-flight", "2", server=server)
        kept = Path(".out.jsonl.partial").read_bytes().count(b"\n")
        assert 0 < kept < 30
    room[0] = None
    with StandIn() as server:  # another one: what was in flight at the first may still arrive there
        run("--in-flight", "2", server=server)
    assert len(lines()) == len({row["key"] for row in lines()}) == 30
    assert len(server.bodies) == 30 - kept


def test_killed_ten_times_there_is_one_good_line_a_prompt(place):
    """SIGKILL at random moments, in the middle of requests and of writes."""
    ask(*(f"question {n} of many, what is it?" for n in range(400)))
    fork = multiprocessing.get_context("fork")
    dice = random.Random(0)
    with StandIn(fault=lambda n, _: "slow" if n % 40 == 0 else None) as server:
        killed = 0
        for _ in range(10):
            child = fork.Process(target=quietly, args=(server.url,))
            child.start()
            begun, goal = time.monotonic(), len(server.bodies) + dice.randrange(5, 40)
            while child.is_alive() and len(server.bodies) < goal and time.monotonic() - begun < 20:
                time.sleep(0.002)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                killed += 1
            child.join()
        assert killed == 10 and not Path("out.jsonl").exists()
        with open(".out.jsonl.partial", "ab") as torn:
            torn.write(b'{"id": "cut by the elev')
        run("--in-flight", "16", server=server)
        asked_in_all = len(server.bodies)
    rows = lines()
    assert sorted(map(asked, rows)) == sorted(f"question {n} of many, what is it?" for n in range(400))
    assert all(row["output_ids"] and row["finish"] == "stop" for row in rows)
    assert asked_in_all <= 400 + 10 * 16, "at most what was in flight at a kill is asked again"


def quietly(url: str) -> None:
    """The child of the kill test; what it prints is nobody's."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    run("--in-flight", "16", "--server", url)


def test_in_this_process_the_same_contract_and_a_cut_run_gives_the_same_answers(place, monkeypatch):
    chat = [
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "four"},
    ]
    ask(*(f"what is {n}?" for n in range(9)), {"messages": chat})
    words = ("--batch-size", "4", "--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu")
    run(*words)
    whole = lines()
    assert len(whole) == 10 and {len(row["messages"]) for row in whole} == {2, 4}
    Path("out.jsonl").unlink()
    real = generate.answer

    calls = []

    def counting(model, prompts, sampling, seed):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(seed)
        return real(model, prompts, sampling, seed)

    monkeypatch.setattr(generate, "answer", counting)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert not Path("out.jsonl").exists() and Path(".out.jsonl.partial").exists()
    monkeypatch.setattr(generate, "answer", real)
    run(*words)
    assert sorted(lines(), key=lambda row: row["key"]) == sorted(whole, key=lambda row: row["key"])


def test_engines_are_started_and_stopped_and_share_the_gpu(place, monkeypatch):
    started = []

    def command(serving):
        started.append(serving.flags)
        return [
            sys.executable,
            str(Path(__file__).parents[1] / "helpers" / "stand_in.py"),
            "--port",
            str(serving.port),
        ]

    monkeypatch.setattr(engines, "command", command)
    monkeypatch.setattr(engines, "sglang_version", lambda: "0")
    monkeypatch.setattr(engines.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        engines.torch.cuda, "get_device_properties", lambda _: type("Gpu", (), {"total_memory": 80 * 10**9})
    )
    servers = []
    real = engines.together
    monkeypatch.setattr(engines, "together", lambda given: servers.extend(given) or real(given))
    run(
        "--engines",
        "2",
        "--in-flight",
        "100",
        "--",
        "--attention-backend",
        "triton",
        "--max-total-tokens",
        "9000",
    )
    assert len(lines()) == 30
    assert [flags.count("--max-total-tokens") for flags in started] == [1, 1]
    assert "50" == started[0][started[0].index("--max-running-requests") + 1]
    assert started[0][-4:] == ["--attention-backend", "triton", "--max-total-tokens", "9000"]
    assert len(servers) == 2 and all(server.process.poll() is not None for server in servers)


def test_the_cache_is_what_fits_beside_the_weights(base_folder):
    config = json.loads((base_folder / "config.json").read_text())
    a_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * 16 * 2
    weights = sum(path.stat().st_size for path in base_folder.glob("*.safetensors"))
    tokens = engines.cache_tokens(str(base_folder), 10**9, 2, 12e9)
    assert tokens == (12e9 - weights - 2e9) // a_token
    assert engines.cache_tokens(str(base_folder), 10, 2, 12e9) == 10 * config["max_position_embeddings"]
    with pytest.raises(InputError, match="does not fit"):
        engines.cache_tokens(str(base_folder), 10, 2, 2e9)
    alone = engines.throughput_flags(str(base_folder), 300, "bfloat16", 1, 80 * 10**9)
    assert "--max-total-tokens" not in alone and alone[-1] == "300"


@pytest.mark.parametrize(
    "flag", [["--port", "5"], ["--tp", "1", "--config", "x"], ["stray"], ["-tp", "2"], ["--"]]
)
def test_flags_that_cannot_work_are_refused_before_an_engine_is_looked_for(place, flag, capsys):
    (place / "p.jsonl").write_text('{"prompt": "what is red"}\n')
    line = ["--prompts", "p.jsonl", "--out", "o.jsonl", "--model", "model", "--engines", "1", "--", *flag]
    with pytest.raises(InputError, match=" --|^--"):
        distill.main(line)
    assert not (place / "o.jsonl.run.json").exists() and capsys.readouterr().err == ""


def test_engines_need_sglang_and_a_gpu(place, monkeypatch):
    monkeypatch.setattr(engines, "sglang_version", lambda: "0")
    monkeypatch.setattr(engines.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="needs a GPU"):
        run("--engines", "1")
    with pytest.raises(InputError, match="flags after --"):
        run("--", "--x")


def test_the_benchmark_measures_combinations_and_keeps_every_answer(place, monkeypatch, capsys):
    @contextlib.contextmanager
    def two(model, count, requests, dtype, flags, logs):
        assert (count, requests, flags) == (2, 8, ["--x", "1"])
        with StandIn() as one, StandIn() as other:
            yield [one.url, other.url]

    monkeypatch.setattr(benchmark, "engines", two)
    monkeypatch.setattr(benchmark, "WARM", 4)
    words = "--try 1x2 2x8 --rounds 2 --all --model model --prompts prompts.jsonl --max-new-tokens 64"
    words += " --out out.jsonl -- --x 1"
    monkeypatch.setattr(sys, "argv", ["benchmarks/distill.py", *words.split()])
    benchmark.main()
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row[:4]] for row in table[1:]]
    assert cells[:3] == [["warm-up", "2", "8", "8"], ["try", "1", "2", "4"], ["try", "2", "8", "16"]]
    assert len(cells) == 4 and (cells[3][0], cells[3][3]) == ("all", "2")
    assert len(lines()) == len({row["key"] for row in lines()}) == 30
    times = [(10.0 + n, 5) for n in range(8)]
    assert benchmark.figures(times, 9.0) == {
        "prompts": 8,
        "output_tokens": 40,
        "seconds": 8.0,
        "tokens_per_s": 5,
        "steady_tokens_per_s": 5,
    }


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("2.5") == 2.5 and retry_after(None) == retry_after("soon") == retry_after("-1") == 0.0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 28 < retry_after(date) <= 30
