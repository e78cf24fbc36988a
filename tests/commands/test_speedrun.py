"""The speedrun as a user runs it: the whole path on a tiny model, what is refused at once, how it stops."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny import save_llama

from fastmtp import speedrun, train
from fastmtp.cli import InputError
from fastmtp.files import check_output
from fastmtp.pipeline.processes import StageFailed, in_process
from fastmtp.pipeline.stages import Stage

KNOWN = {
    key
    for name in ("configs/quickstart.yaml", "configs/speedrun.yaml")
    for key in speedrun.complete(speedrun.read_recipe(name), name)
} | {"max_steps"}

WORDS = "red blue green cat dog log mat sat four two eight nine".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A raw model, prompts and questions of two benchmarks."""
    folder = tmp_path_factory.mktemp("speedrun")
    save_llama(folder / "model")
    prompts = [{"prompt": f"what is {WORDS[n % 12]} {WORDS[n * 5 % 12]} {n}?"} for n in range(24)]
    prompts[3] = {"prompt": "so tell me: how many cats and dogs sat on the log and the mat? four or eight?"}
    write(folder / "prompts.jsonl", prompts)
    (folder / "bench").mkdir()
    question = "how many cats and dogs sat on the log and the mat?"
    write(folder / "bench" / "math_500.jsonl", [{"problem": question}])
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(place: Path, *flags: str) -> list[str]:
    words = ["--smoke", "--model", place / "model", "--data", place / "prompts.jsonl"]
    words += ["--questions", place / "bench", "--tasks", "math_500", "--num-questions", "1", *flags]
    return list(map(str, words))


@pytest.mark.slow
def test_a_raw_model_becomes_a_measured_one_and_nothing_is_done_twice(place):
    pytest.importorskip("swift")
    out = place / "run"
    flags = command(place, "--out", str(out), "--arms", "baseline,fastmtp:3+own")
    line = [sys.executable, "-m", "fastmtp.speedrun", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    last = first.stdout.splitlines()[-1]
    assert last.startswith("speedrun: tau=") and last.endswith(f"lossless=true report={out}/report/report.md")
    summary = json.loads((out / "summary.json").read_text())
    assert (
        1 <= summary["tau"] <= 4 and summary["arm"] == "fastmtp:3+own" and f"tau={summary['tau']:.2f}" in last
    )
    check_output(out / "evaluation")  # all in it is on record, so that it can be made again
    report = (out / "report" / "report.md").read_text()
    assert "| fastmtp:3+own |" in report and "losses.png" in report
    pictures = {part.split(")")[0] for part in report.split("](")[1:]}
    assert pictures and all((out / "report" / name).is_file() for name in pictures)
    rows = (out / "data" / "train.jsonl").read_text() + (out / "data" / "eval.jsonl").read_text()
    assert "dogs sat on the log" not in rows and "what is" in rows  # the benchmark's question
    again = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and again.stdout.count("] reused ") == 12
    assert again.stdout.splitlines()[-1] == last


def test_a_dry_run_prints_every_command_and_makes_nothing(place, capsys, monkeypatch):
    monkeypatch.setattr(train, "swift_keys", lambda: KNOWN)
    words = command(place, "--out", str(place / "dry"), "--dry-run", "--max_steps", "9", "--until", "train")
    speedrun.main([*words, "--overwrite", "true"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines[:3]] == ["[prepare", "[distil", "[curate"]
    assert "--max_steps 9" in lines[6] and lines[6].startswith("[train] python -m fastmtp.train")
    assert lines[6].endswith("--overwrite true")  # of the command itself, no key of a recipe
    assert len(lines) == 8 and not (place / "dry").exists()


def test_time_and_disk_are_estimated(place, capsys, monkeypatch):
    monkeypatch.setattr(train, "swift_keys", lambda: KNOWN)
    monkeypatch.setattr(speedrun.estimate, "billions", lambda model: 1.5)
    totals = []
    for gpus in ("1", "4"):
        words = command(place, "--out", str(place / "dry"), "--dry-run", "--prompts", "40000")
        words += ["--gpus", gpus, "--max-new-tokens", "512"]
        speedrun.main(words)
        totals.append(capsys.readouterr().out.splitlines()[-1])
    assert "on 1 GPU(s)" in totals[0] and "GB of disk" in totals[0]
    minutes = [int(text.split(" min")[0].rpartition(" ")[2]) for text in totals]
    assert minutes[1] < minutes[0] < 600


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--learning_rat", "1e-4"], "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        (["--mtp_num_steps", "0"], "mtp_num_steps"),
        (["--output_dir", "x"], "--output_dir: is set by this command"),
        (["--tasks", "mt_bench"], "no files named mt_bench"),
        (["--data", "none.yaml"], "none.yaml: no such file"),
        (["--prompts", "0"], "--prompts must be at least 1"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(place, monkeypatch, flags, words):
    monkeypatch.setattr(train, "swift_keys", lambda: KNOWN)
    with pytest.raises(InputError, match=words):
        speedrun.main(command(place, "--out", str(place / "no"), *flags))
    assert not (place / "no").exists()


def test_without_a_gpu_the_whole_run_is_refused(place, monkeypatch):
    monkeypatch.setattr(speedrun, "visible_gpus", lambda: 0)
    words = [word for word in command(place, "--out", str(place / "no")) if word != "--smoke"]
    with pytest.raises(InputError, match="no GPU is visible"):
        speedrun.main(words)


def test_visible_gpus_follow_the_environment(monkeypatch):
    for value, count in (("0,2", 2), ("", 0), ("-1", 0), ("GPU-1", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert speedrun.visible_gpus() == count


def program(folder: Path, text: str) -> Stage:
    """A stage that runs a module of its own."""
    (folder / "planted.py").write_text(text)
    return Stage("one", "planted", "", str(folder / "out"), ())


def test_a_stage_that_fails_says_where_its_log_is(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stage = program(tmp_path, "import sys; print('the reason', file=sys.stderr); sys.exit(2)")
    with pytest.raises(StageFailed, match=f"code 2; its log is {tmp_path}/log") as error:
        in_process(stage, tmp_path / "log")
    assert error.value.code == 2 and "| the reason" in capfd.readouterr().err


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_stage_once_and_waits_for_it(tmp_path, sign):
    stage = """
import time
print("ready", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    print("cleaned up", flush=True)
"""
    program(tmp_path, stage)
    runner = f"""
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from fastmtp.cli import run
from fastmtp.pipeline.processes import in_process
from fastmtp.pipeline.stages import Stage
run(lambda: in_process(Stage("one", "planted", "", "out", ()), Path({str(tmp_path / "log")!r})))
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    process = subprocess.Popen([sys.executable, "-c", runner], env=environment, text=True)
    log = tmp_path / "log"
    while not log.exists() or "ready" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sign)
    assert process.wait(30) == 1 and "cleaned up" in log.read_text()
