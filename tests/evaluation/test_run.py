"""The whole table: arms, servers started and stopped (stand-ins), drift, resume, charts; and without any
server.
"""

import itertools
import json
import sys
from pathlib import Path

import pytest
from helpers.evaluating import arguments, fake_decoder, read
from helpers.stand_in import PAUSE, free_port

from evaluation import charts, plan, run, table
from evaluation.plan import REPEAT
from fastmtp.cli import InputError
from fastmtp.engines import process, sglang
from fastmtp.files import check_output

HERE = Path(__file__).parents[1]


def test_the_whole_table_over_servers(model, short_tasks, started, tmp_path, capsys):
    out, port = tmp_path / "out", str(free_port())
    more = [
        "--arms",
        "baseline,fastmtp:1,fastmtp:3",
        "--tasks",
        "nq_qa,nq_rag,cnn_dm",
        "--port",
        port,
        "--repeat-questions",
        "3",
    ]
    run.main(arguments(model, short_tasks, out, *more, "--", "--mem-fraction-static=0.5"))
    lines = read(out / "results.jsonl")
    assert [(x["arm"], x["task"]) for x in lines] == [
        (arm, task)
        for arm in ("baseline", "fastmtp:1", "fastmtp:3", REPEAT)
        for task in ("nq_qa", "nq_rag", "cnn_dm")
    ]
    by = {(x["arm"], x["task"]): x for x in lines}
    assert by["baseline", "nq_qa"]["speedup"] == 1.0
    assert by["fastmtp:3", "nq_qa"]["lossless"]["share"] == 1.0
    assert by["fastmtp:3", "nq_qa"]["accept_length"] > by["fastmtp:1", "nq_qa"]["accept_length"] > 1
    assert by[REPEAT, "nq_qa"]["num_questions"] == 3 and by[REPEAT, "nq_qa"]["lossless"]["questions"] == 3
    assert len(started) == 4
    spec = started[2]
    assert (
        spec[spec.index("--speculative-num-steps") + 1] == "3" and "--speculative-algorithm" not in started[0]
    )
    assert "--mem-fraction-static=0.5" in spec and "--mem-fraction-static" not in spec
    assert spec[spec.index("--dtype") + 1] == "bfloat16"
    for name in ("table.json", "table.md", "run.json", "radar.png", "steps.png", "acceptance.png"):
        assert (out / name).stat().st_size > 0
    assert "| fastmtp:3 |" in capsys.readouterr().out
    report = json.loads((out / "table.json").read_text())
    assert set(report["drift"]) == {"nq_qa", "nq_rag", "cnn_dm"}
    spans = report["cells"]["fastmtp:3"]["nq_qa"]["intervals"]
    assert spans["accept_length"][0] <= by["fastmtp:3", "nq_qa"]["accept_length"] <= spans["accept_length"][1]

    # The pictures again, from the figures alone.
    (out / "radar.png").unlink()
    charts.main([str(out)])
    assert (out / "radar.png").exists()
    with pytest.raises(InputError, match="no table.json; give the --out"):
        charts.main([str(tmp_path)])

    # The same command again: no server, the same numbers.
    run.main(arguments(model, short_tasks, out, *more, "--", "--mem-fraction-static=0.5"))
    assert len(started) == 4 and read(out / "results.jsonl") == lines
    # One arm's answers lost: only that arm is asked again.
    (out / "answers" / "fastmtp-1" / "nq_qa.jsonl").unlink()
    run.main(arguments(model, short_tasks, out, *more, "--", "--mem-fraction-static=0.5"))
    assert len(started) == 5 and started[4][started[4].index("--speculative-num-steps") + 1] == "1"


def test_servers_at_once_get_ports_and_memory_of_their_own(model, short_tasks, started, tmp_path):
    more = ["--arms", "baseline,fastmtp:1,fastmtp:2", "--tasks", "nq_qa", "--at-once", "2", "--parallel", "4"]
    out, port = tmp_path / "out", free_port()
    run.main(arguments(model, short_tasks, out, *more, "--port", str(port), "--dtype", "float32"))
    assert [x["arm"] for x in read(out / "results.jsonl")] == ["baseline", "fastmtp:1", "fastmtp:2", REPEAT]
    assert [line[line.index("--port") + 1] for line in started] == [str(port), str(port + 1)] * 2
    for line in started:
        assert line[line.index("--max-total-tokens") + 1] == str(4 * (30 + plan.PROMPT_ROOM))
        assert line.count("--attention-backend") == 1 and "--enable-deterministic-inference" in line
        assert "--sleep-on-idle" in line
    with pytest.raises(InputError, match="--at-once must be at least 1, not 0"):
        run.main(arguments(model, short_tasks, out, *more, "--at-once", "0"))


def test_arms_on_one_card_take_turns_question_by_question(model, short_tasks, started, tmp_path, monkeypatch):
    monkeypatch.setenv(PAUSE, "0.001")
    more = ["--arms", "baseline,fastmtp:1,fastmtp:2", "--tasks", "nq_qa,nq_rag", "--at-once", "4"]
    more += ["--repeat-questions", "2", "--port", str(free_port())]
    out = tmp_path / "out"
    run.main(arguments(model, short_tasks, out, *more))
    spans = sorted(
        (turn["started"], turn["started"] + turn["latency_s"], path.parent.name)
        for path in (out / "answers").glob("*/*.jsonl")
        for row in read(path)
        for turn in row["turns"]
    )
    assert all(stop <= begin for (_, stop, _), (begin, _, _) in itertools.pairwise(spans))
    folders = [folder for _, _, folder in spans]
    arms = ["baseline", "fastmtp-1", "fastmtp-2"]
    asked = folders.count("baseline")
    assert asked > 4 and sorted(folders[:3]) == arms
    assert all(sorted(folders[n : n + 3]) == arms for n in range(0, 3 * asked, 3))
    assert set(folders[3 * asked :]) == {REPEAT}  # at the end, when no other arm is asked


def test_a_tree_arm_is_served_and_never_taken_for_another_tree(model, short_tasks, started, tmp_path):
    out = tmp_path / "out"
    for nodes, asked in (("8", True), ("8", False), ("16", True)):
        started.clear()
        more = ["--arms", f"fastmtp:3@tree{nodes}", "--tasks", "nq_qa", "--port", str(free_port())]
        run.main(arguments(model, short_tasks, out, *more))
        assert bool(started) == asked
        (line,) = read(out / "results.jsonl")
        tree = {"topk": 4, "depth": 3, "nodes": int(nodes)}
        assert line["num_steps"] == 3 and line["config"]["fingerprint"]["tree"] == tree
    assert started[0][started[0].index("--speculative-num-draft-tokens") + 1] == "16"


def test_two_cards_and_two_levels_of_streams(model, short_tasks, started, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv(PAUSE, "0.002")
    devices, begin = [], process.Server.start

    def start(server):
        devices.append(server.env["CUDA_VISIBLE_DEVICES"])
        begin(server)

    monkeypatch.setattr(process.Server, "start", start)
    more = ["--arms", "baseline,fastmtp:1,fastmtp:3", "--tasks", "nq_qa,nq_rag,cnn_dm", "--gpus", "2"]
    more += ["--repeat-questions", "2", "--streams", "1,4", "--port", str(free_port())]
    out = tmp_path / "out"
    run.main(arguments(model, short_tasks, out, *more))
    assert devices == ["3", "5"] * 3  # baselines, arms, baselines again
    for line in started:
        assert line[line.index("--max-running-requests") + 1] == "4"
    lines = {(x["arm"], x["task"]): x for x in read(out / "results.jsonl")}
    two = lines["fastmtp:3", "nq_qa"]
    assert two["environment"]["card"] == 1 and two["config"]["fingerprint"]["card"] == 1
    ours = lines["baseline_gpu1", "nq_qa"]["throughput"]
    assert two["speedup"] == pytest.approx(two["throughput"] / ours)
    report = json.loads((out / "table.json").read_text())
    assert report["arms"] == ["baseline", "fastmtp:1", "fastmtp:3"] and set(report["cards"]) == {"0", "1"}
    levels = {(x["arm"], x["streams"]): x for x in read(out / "streams.jsonl")}
    assert set(levels) == {(a, n) for a in report["arms"] for n in (1, 4)}
    assert levels["fastmtp:3", 4]["accept_length"] > levels["fastmtp:1", 4]["accept_length"] > 1
    assert levels["baseline", 4]["throughput"] > levels["baseline", 1]["throughput"]
    assert (out / "streams.png").stat().st_size > 0 and "at a time" in (out / "table.md").read_text()

    # Again: nothing is asked. A level that was lost is measured again, on the arm's own card.
    run.main(arguments(model, short_tasks, out, *more))
    (out / "streams" / "fastmtp-3" / "4.json").unlink()
    run.main(arguments(model, short_tasks, out, *more))
    assert devices[6:] == ["5"]
    more[more.index("2")] = "1"
    with pytest.raises(InputError, match="made under other settings .card: 0 -> none"):
        run.main(arguments(model, short_tasks, out, *more))


def test_a_server_that_dies_at_start_shows_its_last_lines(model, short_tasks, monkeypatch, tmp_path):
    def dying(*_, **__):
        return [sys.executable, "-c", "print('CUDA out of memory'); raise SystemExit(3)"]

    monkeypatch.setattr(sglang, "command", dying)
    monkeypatch.setattr(sglang, "sglang_version", lambda: "0.5.17")
    with pytest.raises(SystemExit) as caught:
        run.main(
            arguments(model, short_tasks, tmp_path / "out", "--tasks", "nq_qa", "--port", str(free_port()))
        )
    assert "exit code 3" in caught.value.code and "CUDA out of memory" in caught.value.code


def test_the_same_arms_without_a_server(model, short_tasks, monkeypatch, tmp_path):
    calls = fake_decoder(monkeypatch)
    out = tmp_path / "out"
    more = [
        "--backend",
        "reference",
        "--arms",
        "fastmtp:3,baseline",
        "--tasks",
        "nq_qa",
        "--num-questions",
        "4",
    ]
    run.main(arguments(model, short_tasks, out, *more))
    lines = read(out / "results.jsonl")
    assert [x["arm"] for x in lines] == ["baseline", "fastmtp:3", REPEAT]
    spec = lines[1]
    assert spec["output_tokens"] == 48 and spec["accept_length"] == 48 / 16
    assert spec["position_rates"] == [0.75, 0.5, 0.25] and spec["lossless"]["share"] == 1.0
    assert spec["environment"]["backend"] == "reference" and spec["config"]["dtype"] == "float32"
    assert calls[0] == ((model, "float32", "cpu"), 0, None)
    assert (out / "radar.png").exists()
    check_output(out)  # the record names all that is in the folder, or it could not be replaced


def test_without_a_baseline_there_are_no_claims(model, short_tasks, monkeypatch, tmp_path):
    fake_decoder(monkeypatch)
    out = tmp_path / "out"
    run.main(
        arguments(
            model,
            short_tasks,
            out,
            "--backend",
            "reference",
            "--arms",
            "fastmtp:1,fastmtp:3",
            "--tasks",
            "nq_qa",
        )
    )
    assert [(x["arm"], x["speedup"], x["lossless"]) for x in read(out / "results.jsonl")] == [
        ("fastmtp:1", None, {}),
        ("fastmtp:3", None, {}),
    ]
    assert "No baseline in this run" in (out / "table.md").read_text()
    assert (out / "steps.png").exists() and not (out / "radar.png").exists()
    assert "steps.png" in (out / "table.md").read_text() and "radar.png" not in (out / "table.md").read_text()
    (out / "mine.png").write_bytes(b"mine")
    plain = ("--backend", "reference", "--arms", "baseline", "--tasks", "nq_qa")
    run.main(
        arguments(model, short_tasks, out, *plain)
    )  # nothing is drawn, and nothing of another table stays
    assert [path.name for path in out.glob("*.png")] == ["mine.png"]
    assert ".png" not in (out / "table.md").read_text()


def test_different_text_in_float32_is_called_out(model, short_tasks, monkeypatch, tmp_path, capsys):
    fake_decoder(monkeypatch, lossless=False)
    run.main(arguments(model, short_tasks, tmp_path / "out", "--backend", "reference", "--tasks", "nq_qa"))
    assert "NOT LOSSLESS in float32: fastmtp:3 on nq_qa: 0 of 6" in capsys.readouterr().out


def test_wrong_use_is_found_before_anything_starts(model, short_tasks, started, tmp_path):
    out = tmp_path / "out"
    for more, message in (
        (["--tasks", "nothing"], "is not a task"),
        (["--backend", "reference", "--parallel", "2"], "one request at a time"),
        (["--num-questions", "0"], "at least 1"),
        (["--model", str(tmp_path / "none")], "no such model folder"),
        (["--tasks", "math_500"], "no files named math_500"),
    ):
        with pytest.raises(InputError, match=message):
            run.main(arguments(model, short_tasks, out, *more))
    assert not started and not out.exists()


def test_warnings_tell_when_not_to_believe():
    config = {"parallel": 4, "dtype": "bfloat16", "fingerprint": {"--sleep-on-idle": True}}
    answered = {"output_tokens": 9, "position_rates": []}
    lossless = {"reference": "baseline", "questions": 80, "identical": 60, "share": 0.75}
    lines = [
        {"arm": "baseline", "task": "t", "num_questions": 80, "lossless": {}, "config": config} | answered,
        {"arm": "fastmtp:3", "task": "t", "num_questions": 8, "lossless": lossless, "config": config}
        | answered,
        {"arm": "fastmtp:1", "task": "t", "num_questions": 80, "lossless": lossless | {"identical": 1}}
        | {"config": config, "output_tokens": 9, "position_rates": None},
        {"arm": "fastmtp:1", "task": "u", "num_questions": 80, "lossless": lossless, "config": config}
        | answered,
        {"arm": "fastmtp:2", "task": "t", "num_questions": 80, "lossless": {}, "config": config}
        | {"output_tokens": 0, "position_rates": None},
    ]
    text = "\n".join(table.warnings(lines, {"t": -0.05, "u": 0.04, "v": 0.01}))
    for part in (
        "on 2 of 3 tasks, most on t (-5.0%)",
        "4 requests in flight",
        "Only 8 questions",
        "baseline's: fastmtp:3 60 of 80, fastmtp:1 61 of 160;",
        "The servers slept",
        "rates are unknown",
        "is empty",
    ):
        assert part in text
    assert "drift is unknown" in "\n".join(table.warnings(lines, {}))
    assert "No baseline" in "\n".join(table.warnings(lines[1:], {}))
