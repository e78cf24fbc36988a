"""The benchmarks' command line: three ways to start, files, keys, speed-ups; against a stand-in server."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import stand_in
from helpers.stand_in import StandIn
from helpers.tiny import chatml_tokenizer

from evaluation.harness import arm_of
from evaluation.nq_qa import bench_sglang_eagle as nq_qa
from evaluation.tasks import TASKS
from fastmtp.cli import InputError

ROOT = Path(__file__).parents[2]
ROWS = [{"turns": ["what is red"]}, {"turns": ["what is blue"]}]


@pytest.fixture
def folder(tmp_path):
    """A folder that passes for the served model."""
    folder = tmp_path / "model"
    chatml_tokenizer().save_pretrained(folder)
    (folder / "weights.safetensors").write_bytes(b"first")
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(server, tmp_path, *more):
    """Arguments for a server; its drafts decide the answer file."""
    host, port = server.url.rsplit(":", 1)
    questions = tmp_path / "q.jsonl"
    if not questions.exists():
        write(questions, ROWS)
    files = ["--question-file", questions, "--answer-file", tmp_path / f"{server.num_steps}.jsonl"]
    files += ["--result-file", tmp_path / "r.jsonl"]
    return [*map(str, files), "--host", host, "--port", port, "--max-gen-length", "30", *more]


def bench(server, tmp_path, *more):
    nq_qa.main(options(server, tmp_path, *more))


def lines(tmp_path):
    return [json.loads(row) for row in (tmp_path / "r.jsonl").read_text().splitlines()]


def start(way, task, *arguments):
    """Run a benchmark as a file in its folder, as a file from the root, or as a module."""
    file = f"evaluation/{task}/bench_sglang_eagle.py"
    command, folder = {
        "folder": (["bench_sglang_eagle.py"], ROOT / "evaluation" / task),
        "file": ([file], ROOT),
        "module": (["-m", f"evaluation.{task}.bench_sglang_eagle"], ROOT),
    }[way]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *command, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_seven_files_are_one_but_for_their_first_line():
    files = [ROOT / "evaluation" / task / "bench_sglang_eagle.py" for task in TASKS]
    assert len({file.read_text().split("\n", 1)[1] for file in files}) == 1 and len(files) == 7


@pytest.mark.parametrize("way, task", [("folder", "mt_bench"), ("file", "nq_rag"), ("module", "cnn_dm")])
def test_each_way_to_start_runs_a_benchmark(way, task, folder, tmp_path):
    with StandIn(model=str(folder)) as server:
        done = start(way, task, *options(server, tmp_path))
    assert done.returncode == 0 and done.stdout.startswith(f"{task} baseline: 2 questions"), done.stderr
    command = json.loads((tmp_path / "0.jsonl.run.json").read_text())["command"]
    assert command.startswith(f"python -m evaluation.{task}.bench_sglang_eagle --question-file")


def test_a_file_runs_the_code_of_its_own_checkout(tmp_path):
    """Whatever evaluation or fastmtp is installed, or lies in PYTHONPATH."""
    for package in ("evaluation", "fastmtp"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong one')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "evaluation/nq_rag/bench_sglang_eagle.py", "--help"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0


def test_what_it_needs_is_nothing_of_training_or_of_the_engines():
    modules = "evaluation.run, evaluation.lossless, evaluation.agreement, evaluation.nq_qa.bench_sglang_eagle"
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = set(loaded.stdout.split())
    assert "fastmtp.reference.speculative" in names
    training = {
        "fastmtp.train",
        "fastmtp.swift_plugin",
        "fastmtp.export",
        "fastmtp.curate",
        "fastmtp.distill",
    }
    assert not names & {"swift", "sglang", "vllm", "datasets", "benchmarks", *training}


def test_sigkill_in_the_middle_loses_and_repeats_nothing(folder, tmp_path):
    write(tmp_path / "q.jsonl", [{"turns": [f"what is w{n}"]} for n in range(6, 18)])
    path = tmp_path / "0.jsonl"
    with StandIn(model=str(folder), fault=lambda n, _: "slow") as server:
        command = [sys.executable, "-m", "evaluation.nq_qa.bench_sglang_eagle", *options(server, tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT)
        while not path.exists() or path.read_text().count("\n") < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        finished = path.read_text().count("\n")
        with open(path, "a") as out:
            out.write('{"question": "cut sho')  # what a kill in the middle of a write leaves
        before = len(server.bodies)
        bench(server, tmp_path)
        # The rest and two warm-ups; the question in flight is asked again, because nobody heard its answer.
        assert len(server.bodies) - before == 12 - finished + 2
    assert len(path.read_text().splitlines()) == 12
    assert lines(tmp_path)[0]["num_questions"] == 12


def test_the_command_line_writes_contract_lines(folder, tmp_path, capsys):
    with StandIn(model=str(folder)) as server:
        bench(server, tmp_path)
    with StandIn(model=str(folder), num_steps=2, token_map="/maps/en_32k.pt") as server:
        bench(server, tmp_path)
        capsys.readouterr()
        bench(server, tmp_path)  # again: the line is replaced, not doubled
        assert len(server.bodies) == 2 + 2
    printed = capsys.readouterr()
    assert "nq_qa: 0 asked, 2 kept" in printed.err and "accept length" in printed.out
    plain, spec = lines(tmp_path)
    assert (plain["arm"], plain["num_steps"], plain["accept_length"]) == ("baseline", 0, 1.0)
    assert (spec["arm"], spec["num_steps"], spec["token_map"]) == ("fastmtp:2+en_32k", 2, "/maps/en_32k.pt")
    assert spec["accept_length"] > 1 and len(spec["position_rates"]) == 2
    assert spec["speedup"] == pytest.approx(spec["throughput"] / plain["throughput"])
    assert spec["environment"]["versions"]["sglang"] == "0.5.17"
    assert spec["config"]["questions"]["file"] == "q.jsonl"


@pytest.mark.parametrize(
    "more, change, difference",
    [
        (["--parallel", "2"], None, "parallel: 1 -> 2"),
        (["--max-gen-length", "31"], None, "max_gen_length: 30 -> 31"),
        (["--temperature", "0.5"], None, "temperature: 0.0 -> 0.5"),
        ([], "weights.safetensors", "model: other content"),
        ([], "chat_template.jinja", "model: other content"),
    ],
)
def test_answers_made_otherwise_are_refused_by_name(more, change, difference, folder, tmp_path):
    with StandIn(model=str(folder)) as server:
        bench(server, tmp_path)
        before = (tmp_path / "0.jsonl").read_bytes()
        if change:
            (folder / change).write_text("{{ messages[0].content }}")
        with pytest.raises(InputError, match=f"{difference}.*give another --answer-file"):
            bench(server, tmp_path, *more)
    assert (tmp_path / "0.jsonl").read_bytes() == before


def test_the_same_content_elsewhere_and_touched_is_kept(folder, tmp_path):
    with StandIn(model=str(folder)) as server:
        bench(server, tmp_path)
    moved = folder.rename(tmp_path / "moved")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    with StandIn(model=str(moved)) as server:
        bench(server, tmp_path)
        assert server.bodies == []


def test_a_speed_up_needs_a_baseline_made_alike(folder, tmp_path, capsys):
    with StandIn(model=str(folder)) as server:
        bench(server, tmp_path, "--parallel", "2")
    with StandIn(model=str(folder), num_steps=2) as server:
        bench(server, tmp_path)
        assert "no speed-up: the baseline differs" in (printed := capsys.readouterr().err)
        assert "parallel: 2 -> 1" in printed
        write(tmp_path / "q.jsonl", ROWS[:1] + [{"turns": ["what is green"]}])  # as many, but others
        bench(server, tmp_path, "--answer-file", str(tmp_path / "other.jsonl"), "--parallel", "2")
        assert "other questions" in capsys.readouterr().err
    assert [line["speedup"] for line in lines(tmp_path)] == [None, None, None]


@pytest.mark.parametrize("option", ["--answer-file", "--result-file"])
@pytest.mark.parametrize("content", [b"a poem without a newline", b"", b'{"settings": "x", "turns": []}\n'])
def test_a_file_that_is_not_ours_stays_as_it_is(option, content, folder, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with StandIn(model=str(folder)) as server:
        with pytest.raises(InputError, match="notes.txt: the file was not written by this project"):
            bench(server, tmp_path, option, str(path))
        assert server.bodies == []
    assert path.read_bytes() == content and not (tmp_path / "notes.txt.run.json").exists()


@pytest.mark.parametrize("option", ["--answer-file", "--result-file"])
def test_the_questions_are_not_an_output(option, folder, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "q.jsonl")
    with StandIn(model=str(folder)) as server:
        for path in (tmp_path / "q.jsonl", link):
            with pytest.raises(InputError, match="give two files"):
                bench(server, tmp_path, option, str(path))
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 2
    with StandIn(model=str(folder)) as server, pytest.raises(InputError, match="give two files"):
        bench(server, tmp_path, "--answer-file", str(tmp_path / "r.jsonl"))


def test_a_histogram_under_its_old_name_counts_and_without_one_rates_are_unknown(
    folder, tmp_path, monkeypatch
):
    def without(*names):
        def send(handler, *arguments):
            data = arguments[-1]
            for name in names:
                data = data.replace(f'"{name}"'.encode(), b'"renamed"')
            return original(handler, data)

        return send

    original = stand_in.Handler.finish_stream
    monkeypatch.setattr(stand_in.Handler, "finish_stream", without("spec_correct_drafts_histogram"))
    with StandIn(model=str(folder), num_steps=2) as server:
        bench(server, tmp_path)
        names = ("spec_correct_drafts_histogram", "spec_accept_histogram")
        monkeypatch.setattr(stand_in.Handler, "finish_stream", without(*names))
        bench(server, tmp_path, "--answer-file", str(tmp_path / "b.jsonl"), "--num-questions", "1")
    assert all(rate > 0 for rate in lines(tmp_path)[0]["position_rates"])
    assert lines(tmp_path)[1]["position_rates"] is None and lines(tmp_path)[1]["accept_length"] > 1


def test_the_key_goes_to_the_server_and_into_no_file(folder, tmp_path, monkeypatch):
    keys = []
    original = stand_in.Handler.do_GET
    monkeypatch.setattr(
        stand_in.Handler,
        "do_GET",
        lambda handler: keys.append(handler.headers.get("Authorization")) or original(handler),
    )
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    with StandIn(model=str(folder)) as server:
        monkeypatch.setattr(sys, "argv", ["x", *options(server, tmp_path, "--api-key", "sesame")])
        nq_qa.main()
    assert set(keys) == {"Bearer sesame"}
    for path in tmp_path.glob("*.json*"):
        assert "sesame" not in path.read_text()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--parallel", "0"], "--parallel must be at least 1, not 0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--timeout", "0"], "--timeout 0.0"),
        (["--host", "127.0.0.1", "--port", "70000"], "--port 70000: must be between 1 and 65535"),
        (["--model", "nowhere"], "nowhere: no such model folder"),
    ],
)
def test_wrong_use(more, message, folder, tmp_path):
    with StandIn(model=str(folder)) as server, pytest.raises(InputError, match=message):
        bench(server, tmp_path, *more)
    assert not (tmp_path / "r.jsonl").exists()


def test_a_failing_server_is_exit_code_1_and_one_line(folder, tmp_path):
    with StandIn(model=str(folder), fault=lambda n, _: "500") as server:
        with pytest.raises(SystemExit) as caught:
            bench(server, tmp_path)
    assert isinstance(caught.value.code, str) and "the same command continues" in caught.value.code
    assert not (tmp_path / "r.jsonl").exists()


def test_an_arm_is_named_for_what_the_server_drafts():
    drafts = {"speculative_algorithm": "EAGLE", "speculative_num_steps": 5, "speculative_eagle_topk": 1}
    drafts["speculative_num_draft_tokens"] = 6
    assert arm_of({"settings": drafts, "token_map": "/maps/en_32k.pt"})[2] == "fastmtp:5+en_32k"
    tree = drafts | {"speculative_eagle_topk": 4, "speculative_num_draft_tokens": 16}
    assert arm_of({"settings": tree, "token_map": None}) == (5, None, "fastmtp:5@tree4x16")
    assert arm_of({"settings": {"speculative_algorithm": None}, "token_map": None}) == (0, None, "baseline")
