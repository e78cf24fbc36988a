"""The 7B speed model without a GPU: bytes, accept lengths, command lines, arithmetic, traces."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.stand_in import TRACE, StandIn, free_port

from benchmarks import shapes
from benchmarks.speed import measure, table, trace
from benchmarks.speed import run as speed_model
from benchmarks.speed.points import (
    Point,
)
from evaluation.backends import BackendError, Turn
from fastmtp.budget import shapes as budget
from fastmtp.cli import InputError
from fastmtp.engines import sglang
from fastmtp.planning.costs import Drafts, read_costs

MIMO = shapes.SHAPES["mimo-7b"]


def test_bytes_of_mimo_7b_are_those_of_its_weights():
    """Counted by hand: 4096 wide, 36 layers, 32 and 8 heads of 128, MLP 11008, vocabulary 151680, 2 bytes
    each.
    """
    attention = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 4096 + 2 * 1024
    layer = attention + 3 * 4096 * 11008 + 2 * 4096
    assert budget.layer_bytes(MIMO) == 2 * layer
    assert budget.backbone_bytes(MIMO) == pytest.approx(14.0e9, rel=0.002)
    assert budget.draft_bytes(MIMO, 0) == pytest.approx(0.4216e9, rel=0.001)
    assert budget.draft_bytes(MIMO, 151680) / budget.backbone_bytes(MIMO) == pytest.approx(0.1189, abs=0.0005)
    grown = budget.cycle_bytes(MIMO, 3, 32768, 256) - budget.cycle_bytes(MIMO, 0, 0, 256)
    assert grown == 3 * (budget.draft_bytes(MIMO, 32768) + 2 * 2 * 8 * 128 * 256)


def test_the_config_is_one_that_serve_accepts(tmp_path):
    shapes.write_folder(MIMO, tmp_path)
    assert sglang.check_model(str(tmp_path), 3)["hidden_size"] == 4096


def test_the_papers_accept_lengths():
    assert [shapes.PAPER.tau(k, None) for k in (1, 2, 3)] == pytest.approx([1.81, 2.37, 2.73])
    assert [shapes.PAPER.tau(k, "32k") for k in (1, 2, 3)] == pytest.approx([1.79, 2.33, 2.66])
    with pytest.raises(InputError, match="rates of 7 positions cannot give K = 8"):
        shapes.PAPER.tau(8, None)


def test_measured_rates_come_from_the_longest_arms_pooled_by_passes(tmp_path):
    def line(arm, steps, rates, tokens, tau, task="t"):
        return {
            "task": task, "arm": arm, "num_steps": steps, "position_rates": rates, "output_tokens": tokens,
            "accept_length": tau,
        }  # fmt: skip

    path = tmp_path / "results.jsonl"
    rows = [
        line("baseline", 0, [], 100, 1.0),
        line("fastmtp:1", 1, [0.9], 100, 1.9),
        line("fastmtp:2", 2, [0.8, 0.4], 300, 2.0),
        line("fastmtp:2", 2, [0.4, 0.0], 50, 1.0, "u"),
        line("fastmtp:2+8k", 2, [0.5, 0.25], 100, 1.75),
        line("vanilla:7", 7, [0.1] * 7, 100, 1.7),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rates = shapes.read_rates(str(path))
    assert rates.full == pytest.approx([0.7, 0.3])  # 150 passes against 50
    assert rates.tau(2, "8k") == pytest.approx(1.75)
    assert rates.tau(2, "16k") == pytest.approx(2.0), "a map that was not measured is taken as the full head"
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match="no fastmtp:K arm"):
        shapes.read_rates(str(path))
    path.write_text("{}\n")
    with pytest.raises(InputError, match="results.jsonl:1: no field 'arm'"):
        shapes.read_rates(str(path))


def turn(tokens, passes, latency, first=0.5):
    return Turn(list(range(tokens)), "", 64, passes, [], 1, first, latency, 0.0, "length")


def test_the_arithmetic_of_a_point():
    turns = [turn(513, 192, 2.0), turn(513, 192, 2.0)]
    bandwidth = 4e12
    row = measure.record(Point(3, "32k", 32768, 2.66), turns, MIMO, 64, bandwidth)
    assert row["tokens_per_s"] == pytest.approx(512 / 1.5)
    assert row["tau"] == pytest.approx(512 / 192)
    assert row["ms_per_cycle"] == pytest.approx(1500 / 192)
    read = budget.cycle_bytes(MIMO, 3, 32768, 64 + 256)
    assert row["bound_ms"] == pytest.approx(1000 * read / bandwidth)
    assert row["bound_share"] == pytest.approx(row["bound_ms"] / row["ms_per_cycle"])
    plain = measure.record(Point(0, None, 151680, 1.0), [turn(513, None, 3.5)], MIMO, 64, bandwidth)
    assert (
        plain["ms_per_cycle"] == pytest.approx(3000 / 512) and plain["tau"] == 1.0 and plain["spread"] is None
    )
    both = table.with_speedups(
        [plain | {"fingerprint": {}, "copy_bandwidth": 4e12}, row | {"copy_bandwidth": 4e12}]
    )
    assert both[1]["speedup"] == pytest.approx(2.0) and "fingerprint" not in both[0]
    other = row | {"variant": "fa3", "base": "fa3", "copy_bandwidth": 4e12}
    lone = table.with_speedups([plain | {"copy_bandwidth": 4e12}, other])[1]
    assert lone["speedup"] is None, "another variant's plain decoding is no measure"
    slow = plain | {"repeat": True, "tokens_per_s": 1.0, "copy_bandwidth": 4e12}
    assert table.with_speedups([both[0], slow])[0]["speedup"] == 1.0
    eight = measure.record(Point(3, "32k", 32768, 2.66), turns, MIMO, 64, bandwidth, 8)
    assert eight["name"] == "k3-32k x8" and eight["tokens_per_s"] == pytest.approx(8 * 512 / 1.5)
    assert eight["ms_per_cycle"] == row["ms_per_cycle"] and eight["bound_ms"] > row["bound_ms"]
    assert table.with_speedups([both[0], eight])[1]["speedup"] is None, "eight streams against one"
    report = {
        "gpu": "G",
        "sglang": "0",
        "rates": "paper",
        "shape": "mimo-7b",
        "assumed": ["8k"],
        "points": both,
    }
    assert "acceptance of 8k was" in table.markdown(report)
    assert "| k3-32k | 2.67 | 341.3 ± 0.0 | 2.00x | 7.812 |" in table.markdown(report)


def test_measuring_and_profiling_over_http(tmp_path):
    with StandIn(num_steps=3) as server:
        turns = asyncio.run(measure.measure(server.url, Point(3, None, 151680, 2.7), 3, 16, 40, 10.0))
        found = asyncio.run(measure.profile(server.url, tmp_path / "traces", 16, 10.0))
        with pytest.raises(BackendError, match="k0|baseline: the server drafts"):
            asyncio.run(measure.measure(server.url, Point(0, None, 151680, 1.0), 1, 16, 40, 10.0))
    assert [len(t.output_ids) for t in turns] == [40, 40, 40]
    assert all(body["sampling_params"]["ignore_eos"] for body in server.bodies)
    assert len({tuple(body["input_ids"]) for body in server.bodies[:5]}) == 5, (
        "no prompt is helped by the cache"
    )
    assert found["cycles"] == 2
    asked = [b["sampling_params"]["max_new_tokens"] for b in server.bodies]
    assert asked[5] == measure.PROFILED_TOKENS


def test_a_trace_is_split_into_the_stages_of_a_cycle():
    found = trace.summarise(TRACE)
    assert found["cycles"] == 2, "the third cycle is not whole"
    assert (found["span"], found["busy"], found["idle"]) == pytest.approx((0.030, 0.024, 0.006))
    assert {name: (count, pytest.approx(ms)) for name, count, ms in found["stages"]} == {
        "verify": (2.0, 0.008),
        "outside graphs, after verify": (2.0, 0.006),
        "idle after verify": (0.0, 0.002),
        "draft-extend": (1.0, 0.005),
        "draft": (3.0, 0.007),
        "idle after draft": (0.0, 0.004),
    }
    assert found["kernels"][0] == ("verify", "gemm", 1.0, pytest.approx(0.006))
    text = trace.text(found)
    assert "2 cycles traced; a cycle 0.030 ms" in text and "idle after draft" in text
    for events, message in (([], "no CUDA graphs"), (trace_of(0), "less than one whole cycle")):
        with pytest.raises(ValueError, match=message):
            trace.summarise(events)


def trace_of(cycle):
    begin = 90 + 30 * cycle
    return [e for e in TRACE if begin <= e["ts"] < begin + 30]


def test_plain_decoding_and_cycles_of_two_graphs_are_named_for_what_they_are():
    plain = [e for e in TRACE if e.get("args", {}).get("correlation", 0) % 10 in (0, 1)]
    assert {name for name, _, _ in trace.summarise(plain)["stages"]} == {
        "decode", "outside graphs, after decode", "idle after decode"
    }  # fmt: skip
    two = [e for e in TRACE if e.get("args", {}).get("correlation", 0) % 10 in (0, 3)]
    assert "draft or draft-extend" in {name for name, _, _ in trace.summarise(two)["stages"]}


@pytest.fixture
def started(monkeypatch):
    """SGLang replaced by stand-ins; the names of the points that were started."""
    monkeypatch.setattr(sglang, "sglang_version", lambda: "0.5.17")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed_model, "copy_bandwidth", lambda: 4e12)
    names = []

    def stand_in(point, folder, port, flags):
        if "--broken" in point.variant.flags and point.num_steps:
            return [sys.executable, "-c", "print('no such kernel'); raise SystemExit(3)"]
        script = Path(__file__).parents[1] / "helpers" / "stand_in.py"
        steps = ["--num-steps", str(point.num_steps), "--no-text"]  # dummy weights have no tokenizer
        return [sys.executable, str(script), "--port", str(port), *steps]

    start = speed_model.start

    def counted(point, *rest):
        names.append(point.name)
        return start(point, *rest)

    monkeypatch.setattr(speed_model, "command", stand_in)
    monkeypatch.setattr(speed_model, "start", counted)
    return names


def arguments(out, *more):
    fixed = [
        "--shape",
        "tiny",
        "--maps",
        "full",
        "--tokens",
        "40",
        "--requests",
        "2",
        "--port",
        str(free_port()),
    ]
    return [*fixed, "--out", str(out), *more]


def test_the_whole_command_with_stand_ins_resumes(tmp_path, started, capsys):
    speed_model.main(arguments(tmp_path, "--steps", "1", "--profile"))
    assert started == ["baseline", "k1-full"] and (tmp_path / "profile-k1-full.txt").exists()
    speed_model.main(arguments(tmp_path, "--steps", "1,2"))
    assert started == ["baseline", "k1-full", "k2-full"]
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [p["name"] for p in report["points"]] == ["baseline", "k1-full", "k2-full"]
    assert report["points"][0]["speedup"] == 1.0 and report["points"][2]["tau"] > report["points"][1]["tau"]
    assert (tmp_path / "speed.png").stat().st_size > 0 and "| k2-full |" in shown.out
    assert "1 points to measure, 2 kept" in shown.err
    started.clear()
    speed_model.main(arguments(tmp_path, "--steps", "1,2"))
    assert not started and "0 points to measure, 3 kept" in capsys.readouterr().err


def test_streams_on_one_server_and_the_table_of_costs(tmp_path, started):
    more = ["--points", "plain,2,2@tree2x4,7@adaptive", "--streams", "1,3", "--variant", "slow=--x"]
    speed_model.main(arguments(tmp_path, *more))
    assert started == ["baseline", "k2-full", "k2-full@tree2x4", "k7-full@adaptive"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "speed.json").read_text())["points"]}
    assert [*rows][4:] == [f"{name} x3" for name in started] and len(rows) == 8
    assert rows["k2-full x3"]["speedup"] and rows["k2-full x3"]["streams"] == 3
    costs = read_costs(tmp_path / "costs.json")
    (cycles,) = costs.costs.values()
    rows_of_head = shapes.SHAPES["tiny"]["vocab_size"]
    assert cycles[Drafts(2, 2, 4, rows_of_head), 3] == rows["k2-full@tree2x4 x3"]["ms_per_cycle"]
    assert {(d.num_steps, d.nodes, n) for d, n in cycles} == {
        (0, 1, 1), (0, 1, 3), (2, 3, 1), (2, 3, 3), (2, 4, 1), (2, 4, 3)
    }  # fmt: skip
    started.clear()
    speed_model.main(arguments(tmp_path, *more))
    assert not started
    with pytest.raises(InputError, match="streams: "):
        speed_model.main(arguments(tmp_path, *more, "--streams", "1,4"))
    with pytest.raises(InputError, match="--streams: give numbers from 1"):
        speed_model.main(arguments(tmp_path, *more, "--streams", "0"))


def test_room_and_graphs_for_the_streams():
    args = speed_model.parser().parse_args(["--out", "x"])
    args.streams = [1]
    assert speed_model.load(args) == []
    args.streams = [1, 8, 32]
    flags = speed_model.load(args)
    assert flags[flags.index("--cuda-graph-bs-decode") :][:4] == ["--cuda-graph-bs-decode", "1", "8", "32"]
    assert int(flags[-1]) == 32 * (64 + 512 + 512)


@pytest.mark.parametrize("kind", ["tokens", "flags", "shape", "gpu", "sglang", "environment"])
def test_points_measured_under_anything_else_are_not_kept(tmp_path, started, monkeypatch, kind):
    monkeypatch.setattr(speed_model, "gpu_name", lambda: "one")
    speed_model.main(arguments(tmp_path, "--steps", "1"))
    more = {"tokens": ["--tokens", "50"], "flags": ["--", "--dtype", "float32"]}.get(kind, [])
    if kind == "shape":
        monkeypatch.setitem(shapes.SHAPES["tiny"], "num_hidden_layers", 5)
    if kind == "gpu":
        monkeypatch.setattr(speed_model, "gpu_name", lambda: "another")
    if kind == "sglang":
        monkeypatch.setattr(sglang, "sglang_version", lambda: "0.5.23")
    if kind == "environment":
        monkeypatch.setenv("SGLANG_X", "1")
    with pytest.raises(InputError, match=rf"baseline was measured with other settings \({kind}: "):
        speed_model.main(arguments(tmp_path, "--steps", "1", *more))


def test_a_point_with_other_rates_or_rows_is_measured_again(tmp_path, started, monkeypatch):
    speed_model.main(arguments(tmp_path, "--steps", "1"))
    started.clear()
    rates = shapes.Rates([0.5], [0.5], {}, "other")
    monkeypatch.setattr(shapes, "read_rates", lambda source: rates)
    speed_model.main(arguments(tmp_path, "--steps", "1"))
    assert started == ["k1-full"]


def test_several_servers_at_once_and_one_that_dies(tmp_path, started, capsys):
    more = [
        "--steps",
        "1,2",
        "--at-once",
        "4",
        "--repeat-baseline",
        "--variant",
        "a=",
        "--variant",
        "b=--broken",
    ]
    more += ["--variant", "c:a=V=1"]
    with pytest.raises(SystemExit) as caught:
        speed_model.main(arguments(tmp_path, *more))
    assert "not measured: b.k1-full, b.k2-full" in caught.value.code and "no such kernel" in caught.value.code
    report = json.loads((tmp_path / "speed.json").read_text())
    measured = [
        "a.baseline",
        "a.k1-full",
        "a.k2-full",
        "a.baseline-repeat",
        "b.baseline",
        "b.baseline-repeat",
    ]
    measured += ["c.k1-full", "c.k2-full"]
    assert [p["name"] for p in report["points"]] == measured
    plain = report["points"][0]["tokens_per_s"]
    assert report["points"][-1]["speedup"] == pytest.approx(report["points"][-1]["tokens_per_s"] / plain)
    assert "| a.k2-full |" in capsys.readouterr().out
    started.clear()
    with pytest.raises(SystemExit):
        speed_model.main(arguments(tmp_path, *more))
    assert started == ["b.k1-full", "b.k2-full"], "what was measured stays"
