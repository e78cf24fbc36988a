"""A training that is killed at any moment ends as one that nobody disturbed. Only with `--kills 20 -s`,
because each kill costs two starts of ms-swift; one kill is always tried in test_train_swift.py.
"""

import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.killing import contents, inside_swift
from helpers.training import FLOAT32, STEPS, make_inputs, sft, succeeded
from safetensors.torch import load_file

pytest.importorskip("swift")
pytestmark = pytest.mark.slow
SETTINGS = dict(**FLOAT32, save_steps=1, save_total_limit=2)


def bits(path: Path) -> str:
    """Weights by their content: the order of a file's own notes is left to chance."""
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = sorted(load_file(path).items())
    return hashlib.sha256(b"".join(name.encode() + t.numpy().tobytes() for name, t in tensors)).hexdigest()


def steps(out: Path) -> list[tuple]:
    """What the log says of each step."""
    log = out / "logging.jsonl"
    whole = (
        [line for line in log.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        if log.exists()
        else []
    )
    rows = [row for row in map(json.loads, whole) if "loss" in row or "eval_tau" in row]
    return [(row["global_step/max_steps"], row.get("loss"), row.get("eval_tau")) for row in rows]


def result(out: Path) -> dict:
    """Weights and optimiser of the checkpoints, links, and the log."""
    kept = [*out.glob("checkpoint-*/*.safetensors"), *out.glob("checkpoint-*/optimizer.pt")]
    links = {path.name: os.readlink(path) for path in out.iterdir() if path.is_symlink()}
    return {
        "bits": {str(path.relative_to(out)): bits(path) for path in kept},
        "links": links,
        "steps": steps(out),
    }


def killed_after(work: Path, seconds: float) -> None:
    process = sft(work, "out", start=True, **SETTINGS)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()  # ends when nothing is left that holds its pipes


def test_killed_anywhere_the_training_ends_right(tmp_path, request):
    kills = request.config.getoption("--kills")
    if kills < 20:
        pytest.skip("with --kills 20")
    make_inputs(tmp_path)
    hook, out, dice, hits = tmp_path / "hook", tmp_path / "out", random.Random(0), Counter()
    begun = time.monotonic()
    succeeded(sft(tmp_path, "out", inside_swift(hook, out, 0), **SETTINGS))
    seconds, changes = time.monotonic() - begun, int((hook / "changes").read_text())
    expected, names = result(out), contents(out).keys()
    print(f"\ntrain: {seconds:.0f} s, {changes} changes of files by ms-swift", flush=True)
    for number in dice.sample(range(kills), kills):
        out.rename(tmp_path / f"done-{number}")
        if number % 2:
            moment = dice.uniform(0, seconds)
            point = f"kill {number} after {moment:.1f} s"
            killed_after(tmp_path, moment)
        else:
            step = 1 + round(number / max(kills - 2, 1) * (changes - 1))
            point = f"kill {number} before change {step}"
            sft(tmp_path, "out", inside_swift(hook, out, step), **SETTINGS)
        there = steps(out)
        hits["before" if not there else "after" if there == expected["steps"] else "while training"] += 1
        again = sft(tmp_path, "out", **SETTINGS)
        assert again.returncode == 0, point + again.stdout[-2000:] + again.stderr[-3000:]
        said = [line for line in again.stdout.splitlines() if "continued" in line or "passed over" in line]
        print(f"{point}: {len(there)} lines of the log; {said}", flush=True)
        assert result(out) == expected, point
        assert not contents(out).keys() ^ names, f"{point}: {contents(out).keys() ^ names}"
        hits["ended right"] += 1
    print(f"train: {kills} kills: {dict(hits)}")
    assert hits["ended right"] == kills and hits["while training"] > 0
    assert expected["steps"][-1][0].startswith(f"{STEPS}/")
