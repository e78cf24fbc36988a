"""Real `swift sft` runs on the quickstart's recipe, a tiny model and a few chats: what a training run must
keep to.

Each call costs a start of ms-swift (ten seconds or more on two cores), so the runs are few and shared.
"""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers.killing import can_mount, pages, resize, small_disk
from helpers.training import FLOAT32, HALF, STEPS, make_inputs, sft, succeeded, weights

from fastmtp.acceptance import read_samples
from fastmtp.checkpoint import HEAD_TENSORS, PREFIX, read_head
from fastmtp.export import export
from fastmtp.reference.model import load
from fastmtp.reference.teacher_forced import measure, pooled

pytest.importorskip("swift")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(work) -> Path:
    """The uninterrupted run in float32."""
    succeeded(sft(work, "whole", **FLOAT32))
    return work / "whole"


def test_the_checkpoint_is_the_head_and_every_tensor_of_it_moved(work, whole):
    head, base = weights(whole / f"checkpoint-{STEPS}"), weights(work / "model")
    assert head.keys() == HEAD_TENSORS
    assert all(tensor.dtype == torch.float32 for tensor in head.values())
    assert [name for name in head if torch.equal(head[name], base[name])] == []


def test_the_export_keeps_every_other_tensor(work, whole):
    export(work / "model", whole / f"checkpoint-{STEPS}", work / "exported")
    base, head = weights(work / "model"), weights(whole / f"checkpoint-{STEPS}")
    exported = weights(work / "exported")
    assert exported.keys() == base.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, head[name] if name.startswith(PREFIX) else base[name]), name


def test_the_log_has_the_loss_of_each_step_and_they_make_up_the_loss(whole):
    rows = [json.loads(line) for line in (whole / "logging.jsonl").read_text().splitlines()]
    assert list(rows[0]["start_up"]) == ["imports", "rows", "model", "trainer", "first step"]
    rows = [row for row in rows if "mtp_loss_1" in row]
    assert len(rows) == STEPS
    for row in rows:
        steps = [row[f"mtp_loss_{k}"] for k in (1, 2, 3)]
        alphas = [1 / 1.96, 0.6 / 1.96, 0.36 / 1.96]
        mean = sum(a * x for a, x in zip(alphas, steps, strict=True))
        # each step has one target fewer an answer than the one before, so the mean over answer tokens is a
        # bit lower
        assert 0.7 * mean < row["loss"] < mean
    assert json.loads((whole / "run.json").read_text())["config"]["model_kwargs"]["mtp_num_steps"] == 3


def logged_taus(folder: Path) -> dict[int, float]:
    """{step: tau} of a run's log."""
    rows = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return {
        int(row["global_step/max_steps"].split("/")[0]): row["eval_tau"] for row in rows if "eval_tau" in row
    }


def test_tau_in_the_log_is_what_acceptance_measures_and_the_best_is_linked(work, whole):
    logged = logged_taus(whole)
    assert list(logged) == [HALF, STEPS]
    model = load(work / "model")
    samples = read_samples(work / "heldout.jsonl", model.net.vocab_size, tokenizer=model.tokenizer)
    for step, tau in logged.items():
        model.net.load_head(read_head(whole / f"checkpoint-{step}"))
        assert tau == pytest.approx(pooled(measure(model, samples, 3)).accept_length, abs=1e-4)
    best = max(logged, key=lambda step: (logged[step], -step))
    assert os.readlink(whole / "best-checkpoint") == f"checkpoint-{best}"


def test_resume_is_bit_equal(work, whole):
    succeeded(sft(work, "resumed", **FLOAT32, resume_from_checkpoint=whole / f"checkpoint-{HALF}"))
    checkpoint = f"checkpoint-{STEPS}"
    assert not (work / "resumed" / f"checkpoint-{HALF}").exists(), "the run began at the start"
    wanted, found = weights(whole / checkpoint), weights(work / "resumed" / checkpoint)
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    half = weights(whole / f"checkpoint-{HALF}")
    assert not any(torch.equal(half[name], wanted[name]) for name in wanted), "the second half taught nothing"
    states = [
        torch.load(folder / checkpoint / "optimizer.pt", weights_only=True)["state"]
        for folder in (whole, work / "resumed")
    ]
    assert states[0].keys() == states[1].keys() and len(states[0]) == len(HEAD_TENSORS)
    for key, state in states[0].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][key][n])) for n, v in state.items()
        )


def test_two_processes_are_one(work, whole):
    """Same batches split over two gloo processes, so other counts of targets on each: same head, up to
    rounding.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment = {"NPROC_PER_NODE": "2", "MASTER_PORT": str(probe.getsockname()[1])}
    succeeded(sft(work, "two", environment, **FLOAT32, per_device_train_batch_size=2, ddp_backend="gloo"))
    assert logged_taus(work / "two") == pytest.approx(logged_taus(whole), abs=1e-3)
    base = weights(work / "model")
    wanted, found = weights(whole / f"checkpoint-{STEPS}"), weights(work / "two" / f"checkpoint-{STEPS}")
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name
        moved = (wanted[name] - base[name]).norm()
        assert (found[name] - wanted[name]).norm() < 0.01 * moved, f"{name}: moved elsewhere"


def test_packed_is_padded(work):
    """All chats in one padded batch, or in one packed row whose head is recomputed: same losses, same head,
    up to rounding.
    """
    common = dict(**FLOAT32, max_steps=2, max_length=128)
    succeeded(sft(work, "padded", **common, per_device_train_batch_size=24))
    packing = dict(packing="true", packing_length=4096, attn_impl="flash_attn", per_device_train_batch_size=1)
    succeeded(sft(work, "packed", **common, **packing, gradient_checkpointing="true"))
    wanted, found = weights(work / "padded" / "checkpoint-2"), weights(work / "packed" / "checkpoint-2")
    base = weights(work / "model")
    for name in wanted:
        assert (found[name] - wanted[name]).norm() < 0.01 * (wanted[name] - base[name]).norm(), name
    logs = [
        [json.loads(line) for line in (work / n / "logging.jsonl").read_text().splitlines()]
        for n in ("padded", "packed")
    ]
    for name in ("loss", "mtp_loss_1", "mtp_loss_3"):
        padded, packed = ([row[name] for row in log if name in row] for log in logs)
        assert len(padded) == 2 and packed == pytest.approx(padded, abs=1e-4)


def test_the_recipe_as_it_stands_in_bfloat16(work):
    """bf16 backbone, float32 head: in two steps all tensors move, the norms too, which bf16 would round."""
    succeeded(sft(work, "bf16", max_steps=2, learning_rate="1e-4"))
    head, base = weights(work / "bf16" / "checkpoint-2"), weights(work / "model")
    assert head.keys() == HEAD_TENSORS and all(tensor.dtype == torch.float32 for tensor in head.values())
    assert [name for name in head if torch.equal(head[name], base[name].to(torch.bfloat16).float())] == []


def test_accumulated_is_whole(work, whole):
    """Four rows one after the other are one step of four: same head, up to rounding."""
    batches = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    succeeded(sft(work, "accumulated", **FLOAT32, **batches))
    base, folder = weights(work / "model"), f"checkpoint-{STEPS}"
    expected, head = weights(whole / folder), weights(work / "accumulated" / folder)
    for name in expected:
        moved = (expected[name] - base[name]).norm()
        assert (head[name] - expected[name]).norm() < 0.01 * moved, f"{name}: moved elsewhere"
    assert logged_taus(work / "accumulated") == pytest.approx(logged_taus(whole), abs=1e-3)


def test_the_best_checkpoint_outlives_rotation(work):
    """A learning rate that moves nothing: the first of equals is the best, and later ones push it out."""
    succeeded(sft(work, "still", **FLOAT32, learning_rate="1e-12", save_steps=1, save_total_limit=1))
    assert len(set(logged_taus(work / "still").values())) == 1, "the run does not test what it should"
    assert os.readlink(work / "still" / "best-checkpoint") == "checkpoint-1"
    assert read_head(work / "still" / "best-checkpoint").keys() == HEAD_TENSORS
    left = sorted(path.name for path in (work / "still").glob("checkpoint-*"))
    assert left == ["checkpoint-1", f"checkpoint-{STEPS}"]


@pytest.mark.skipif(not can_mount(), reason="no right to mount a small disk here")
def test_a_full_disk_is_one_line_and_the_same_command_continues(work, whole):
    """There is no space for the last checkpoint but for a share of it, which ends in the weights or in the
    optimiser's state; with space the training goes on.
    """
    last = pages(whole / f"checkpoint-{STEPS}")
    with small_disk(work / "full"):
        for share in (0.15, 0.6):
            resize(work / "full", pages(whole) - last + int(share * last))
            result = sft(work, "full", **FLOAT32)
            assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-4000:]
            assert "Traceback" not in result.stderr and result.stderr.count("the disk is full") == 1
            assert result.stderr.splitlines()[-1].startswith("fastmtp.train: error: ")
        resize(work / "full", 1 << 14)
        result = sft(work, "full", **FLOAT32)
        succeeded(result)
        assert f"continued from step {HALF}" in result.stdout
        expected, head = (weights(folder / f"checkpoint-{STEPS}") for folder in (whole, work / "full"))
        assert all(torch.equal(head[name], expected[name]) for name in expected)


LONG, OFTEN = 60, 5


def started(work: Path, step: int) -> subprocess.Popen:
    """A long run into work/"stopped", as far as its checkpoint at `step`."""
    process = sft(
        work, "stopped", start=True, **FLOAT32, max_steps=LONG, save_steps=OFTEN, save_total_limit=99
    )
    for _ in range(1200):
        if (work / "stopped" / f"checkpoint-{step}" / "trainer_state.json").exists():
            return process
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint-{step} after two minutes")


def test_a_run_killed_and_interrupted_ends_with_the_same_steps(work):
    """SIGKILL leaves nothing behind that trains on; after Ctrl-C the same command continues, as it says."""
    process = started(work, OFTEN)
    process.kill()
    process.communicate()  # ends when nothing is left that holds its pipes
    last = max(int(path.name.split("-")[1]) for path in (work / "stopped").glob("checkpoint-*"))
    assert last < LONG, "the training went on without its command"
    kept = work / "stopped" / "encoded-dataset.npz"  # the rows, so that they are not encoded again
    assert kept.exists()
    process = started(work, last + OFTEN)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "continued from step" in out
    assert "interrupted; the same command continues from" in err.splitlines()[-1]
    settings = dict(**FLOAT32, max_steps=LONG, save_steps=OFTEN, save_total_limit=99)
    result = sft(work, "stopped", **settings)
    succeeded(result)
    assert "continued from step" in result.stdout
    log = [json.loads(line) for line in (work / "stopped" / "logging.jsonl").read_text().splitlines()]
    steps = [int(row["global_step/max_steps"].split("/")[0]) for row in log if "mtp_loss_1" in row]
    assert steps == list(range(1, LONG + 1)) and not kept.exists()
    before = (work / "stopped" / f"checkpoint-{LONG}" / "model.safetensors").stat().st_mtime_ns
    result = sft(work, "stopped", **settings)
    succeeded(result)
    assert f"finished ({LONG} steps); 0 steps done now" in result.stdout
    assert (work / "stopped" / f"checkpoint-{LONG}" / "model.safetensors").stat().st_mtime_ns == before
    result = sft(work, "stopped", **settings, learning_rate="1e-5", mtp_num_steps=5)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "learning_rate: 0.002 -> 1e-05; mtp_num_steps: 3 -> 5" in result.stderr


def test_a_trainable_set_that_is_not_the_head_stops_the_run(base_folder):
    from fastmtp.swift_plugin import check_trainable

    net = load(base_folder).net
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(PREFIX))
    check_trainable(net)
    net.lm_head.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="must be exactly.*lm_head"):
        check_trainable(net)
