"""The distiller on a full disk, killed, in this process, and with stand-ins for engines."""

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
from helpers.distilling import ask, asked, lines, run
from helpers.stand_in import StandIn

from benchmarks import distill as benchmark
from fastmtp import distill
from fastmtp.cli import InputError
from fastmtp.data import engines, generate, journal

pytestmark = pytest.mark.usefixtures("hurry")


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
