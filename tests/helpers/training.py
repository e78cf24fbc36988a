"""Real `swift sft` runs for the tests: the quickstart's recipe on a tiny model and a few chats."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from helpers.tiny import chatml_tokenizer, save_folder
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, HALF = 4, 2
FLOAT32 = {"torch_dtype": "float32", "bf16": "false", "fp16": "false"}


def sft(
    work: Path,
    name: str,
    environment: dict[str, str] | None = None,
    start: bool = False,
    **overrides,
) -> subprocess.CompletedProcess | subprocess.Popen:
    """`python -m fastmtp.train configs/quickstart.yaml` on the tiny model and data of `work`, into work/name.

    Waits for its end, or only starts it, as the first of a process group.
    """
    settings = {
        "model": work / "model",
        "dataset": work / "train.jsonl",
        "output_dir": work / name,
        "max_steps": STEPS,
        "save_steps": HALF,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "mtp_eval_data": work / "heldout.jsonl",
        "group_by_length": "false",  # it excludes packing, and the order must not hang on the batch size
        # the plain loss, whose steps add up to what the log says
        "mtp_labels": "data",
        "mtp_prefix_floor": 1.0,
        "mtp_beta": 0.6,
        **overrides,
    }
    flags = [part for key, value in settings.items() for part in (f"--{key}", *str(value).split(" "))]
    command = [sys.executable, "-m", "fastmtp.train", "configs/quickstart.yaml", *flags]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **(environment or {})}
    common = dict(cwd=REPOSITORY, env={**os.environ, **environment}, text=True)
    if start:
        common["preexec_fn"] = lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # ignored in a background job
        common |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        return subprocess.Popen(command, **common)
    return subprocess.run(command, capture_output=True, check=False, timeout=300, **common)


def succeeded(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def make_inputs(folder: Path) -> None:
    """The model, and 24 chats of one and two turns, answers of different lengths as exact ids."""
    tokenizer = chatml_tokenizer()
    save_folder(folder / "model")
    rows = []
    for n in range(24):
        messages = []
        for turn in range(1 + n % 2):
            answer = tokenizer(f"two plus {n} is four " * (1 + n % 4 + turn))["input_ids"] + [
                tokenizer.eos_token_id
            ]
            messages += [
                {"role": "user", "content": f"what is {n}?"},
                {"role": "assistant", "content": {"token_ids": answer}},
            ]
        rows.append({"messages": messages})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "heldout.jsonl").write_text("".join(lines[:9]), encoding="utf-8")
