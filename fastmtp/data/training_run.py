"""A run that may be interrupted: what it depends on, where it stopped, and whether it may continue there.

`training.json` in output_dir says from the start what the run depends on (a fingerprint by content), and each
checkpoint holds a copy. The same command continues from the last whole checkpoint. A checkpoint of another
recipe, other data or another model is refused, with the difference by name. Files of others stay untouched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fastmtp import files, fingerprint
from fastmtp.cli import InputError
from fastmtp.data.training_set import is_local, split_count
from fastmtp.formats.weights import read_header
from fastmtp.inputs import existing

RECORD = "training.json"
# Keys that say where files lie, what is shown, or how fast it goes; what they name is compared by content.
NO_MATTER = {
    *("output_dir", "model", "dataset", "val_dataset", "external_plugins", "resume_from_checkpoint", "ENV"),
    *("model_kwargs", "callbacks", "report_to", "run_name", "disable_tqdm", "include_num_input_tokens_seen"),
    *("save_steps", "save_strategy", "save_total_limit", "logging_steps", "logging_strategy", "logging_dir"),
    *("logging_first_step", "eval_steps", "eval_strategy", "dataset_num_proc", "packing_num_proc"),
    *("ddp_find_unused_parameters", "ddp_backend", "ddp_timeout", "gradient_checkpointing", "strict"),
}
LENGTH = ("max_steps", "num_train_epochs")
DATALOADER = {
    f"dataloader_{what}" for what in ("num_workers", "pin_memory", "prefetch_factor", "persistent_workers")
}
NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
WRITTEN = re.compile(  # what ms-swift, transformers, DeepSpeed and FSDP put into a checkpoint
    r"training\.json|.*\.safetensors(\.index\.json)?|(optimizer|scheduler|scaler)(_\d+)?(\.pt|\.bin)?"
    r"|rng_state.*\.pth|trainer_state\.json|training_args\.bin|args\.json|(generation_)?config\.json"
    r"|tokenizer.*|chat_template.*|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
    r"|additional_chat_templates|additional_config\.json|global_step\d+|latest|zero_to_fp32\.py|README\.md"
    r"|pytorch_model_fsdp.*"
)


@dataclass
class Start:
    """Where a run begins: `checkpoint` None is the beginning; `finished` says that nothing is left to do.

    found: the fingerprint of what the run depends on.
    """

    checkpoint: Path | None = None
    step: int = 0
    finished: bool = False
    found: dict | None = None


def names(recipe: dict, key: str) -> list[str]:
    """The data sets of a key that takes one or several."""
    value = recipe.get(key) or []
    return [value] if isinstance(value, str) else list(value)


def processes() -> int:
    """How many processes train, over all nodes."""
    counts = [os.environ.get(name) or "1" for name in ("NPROC_PER_NODE", "NNODES")]
    if not all(count.isdigit() and int(count) for count in counts):
        raise InputError(f"NPROC_PER_NODE and NNODES must be whole numbers, not {' and '.join(counts)}")
    return int(counts[0]) * int(counts[1])


def depends_on(recipe: dict) -> dict[str, object]:
    """The fingerprint of what a training's outcome depends on."""
    head = dict(recipe["model_kwargs"])
    contents = {"model": recipe["model"], "mtp_eval_data": head.pop("mtp_eval_data", None)}
    settings = {}
    for key in ("dataset", "val_dataset"):
        data = names(recipe, key)
        contents[key] = [split_count(name)[0] for name in data if is_local(name)]
        taken = [split_count(name)[1] if is_local(name) else name for name in data]
        if any(taken):  # how many rows of a file, or the name on a hub
            settings[f"{key} taken"] = taken
    for key in ("mtp_compile", "mtp_flash_attn"):  # how fast it goes
        head.pop(key, None)
    own = {k: v for k, v in recipe.items() if k not in NO_MATTER | DATALOADER}
    return fingerprint.fingerprint(contents, settings | own | head | {"processes": processes()})


def begin(recipe: dict, overwrite: bool) -> Start:
    """Claim output_dir and decide where the run begins. Raises InputError if it may not begin at all."""
    output, now = Path(recipe["output_dir"]), depends_on(recipe)
    explicit = recipe.get("resume_from_checkpoint")
    if not isinstance(explicit, str | None):
        raise InputError(
            f"resume_from_checkpoint must be a checkpoint's path, not {explicit!r}; leave it out: the same "
            "command continues by itself"
        )
    if explicit and overwrite:
        raise InputError("--overwrite starts over and --resume_from_checkpoint continues; give one of them")
    check_ours(output)
    if int(os.environ.get("NODE_RANK") or 0) == 0:  # the other nodes of a run look and leave it alone
        files.claim(output, folder=True)
        if overwrite:
            clear(output)
    start = Start()
    if explicit:
        start = continued(Path(explicit), now)
        check_same(output, now)
    elif not overwrite:
        start = last_whole(output, now)
    if start.checkpoint and recipe.get("fsdp"):
        raise InputError(f"{start.checkpoint}: fsdp cannot continue; --overwrite true starts over")
    if int(os.environ.get("NODE_RANK") or 0) == 0 and not start.finished:
        cut_log(output / "logging.jsonl", start.step)
        files.write_json(output / RECORD, {"fingerprint": now})
    start.found = now
    return start


def check_ours(output: Path) -> None:
    """InputError if output_dir holds something that this project did not write and training could replace."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output}: not a folder; give another output_dir")
    if not output.exists() or not any(output.iterdir()):
        return
    if (output / "trainer_state.json").exists():
        raise InputError(f"{output}: a checkpoint of another run; give another output_dir")
    if not files.is_ours(output):
        raise InputError(f"{output}: the folder holds other files; give another output_dir or move them away")
    others = (files.read_record(output / "run.json") or {}).get("others", [])
    for path in checkpoints(output):
        ours = (path / RECORD).exists() or not any(path.iterdir())
        if path.name in others or not ours:
            raise InputError(f"{path}: not a checkpoint that this project wrote; move it elsewhere first")


def check_same(output: Path, now: dict) -> None:
    """InputError if output_dir holds checkpoints of another training: rotation would delete them."""
    for path in checkpoints(output):
        before = (_read(path / RECORD) or {}).get("fingerprint")
        if before and fingerprint.differences(_rest(before), _rest(now)):
            raise InputError(f"{path}: a checkpoint of another training; give another output_dir")


def checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders, the first step first."""
    checkpoints = [
        p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()
    ]
    return sorted(checkpoints, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def clear(output: Path) -> None:
    """Remove what an earlier run of ours left: its checkpoints, the links to them, its log. InputError for a
    checkpoint that is a link, or that holds a file of somebody else's.
    """
    for path in checkpoints(output):
        if path.is_symlink():
            raise InputError(f"{path}: a link, which is not removed; move it elsewhere first")
        others = sorted(p.name for p in path.iterdir() if not WRITTEN.fullmatch(p.name))
        if others:
            raise InputError(f"{path / others[0]}: not written by the training; move it elsewhere first")
    for path in checkpoints(output):
        shutil.rmtree(path)
    for name in ("best-checkpoint", "last-checkpoint", "logging.jsonl", RECORD):
        path = output / name
        if path.is_symlink() or path.is_file():
            path.unlink()


def last_whole(output: Path, now: dict) -> Start:
    """The last checkpoint of output_dir that was written to its end.

    The state is the last file that a checkpoint gets; one without it was cut short by a kill.
    """
    for path in reversed(checkpoints(output)):
        try:
            state(path)
        except InputError as error:
            print(f"fastmtp.train: {error}; passed over", flush=True)
            continue
        return continued(path, now)
    return Start()


def continued(checkpoint: Path, now: dict) -> Start:
    """Begin at a checkpoint. InputError if it is not whole, or of a run that depends on something else."""
    progress = state(checkpoint)
    missing = [name for name in NEEDED if not is_whole(checkpoint, name)]
    if missing and not any(checkpoint.glob("global_step*")):  # deepspeed keeps the optimiser there
        raise InputError(
            f"{checkpoint}: no whole {missing[0]}, so it cannot be continued; --overwrite true starts over"
        )
    before = (_read(checkpoint / RECORD) or {}).get("fingerprint")
    if not isinstance(before, dict):
        raise InputError(
            f"{checkpoint}: no {RECORD} says what it was trained with; export it and train from that folder"
        )
    changed = fingerprint.differences(_rest(before), _rest(now)) + shorter(before, now, progress)
    if changed:
        raise InputError(
            f"{checkpoint}: trained with other settings: {'; '.join(changed)}; undo that, give another "
            "output_dir, or start over with --overwrite true"
        )
    longer = fingerprint.differences(before, now)
    if longer:
        words = "; ".join(longer)
        print(f"fastmtp.train: longer than before ({words}); the learning rate follows the new length")
    target = _length(now, "max_steps") or (float("inf") if longer else progress["max_steps"])
    return Start(checkpoint.resolve(), progress["global_step"], progress["global_step"] >= target)


def is_whole(checkpoint: Path, name: str) -> bool:
    """Whether a checkpoint has files of this name (a pattern), and none of them is torn."""
    paths = list(checkpoint.glob(name))
    if name.endswith(".safetensors"):
        return all(read_header(path) for path in paths) and bool(paths)
    return all(zipfile.is_zipfile(path) for path in paths) and bool(paths)  # as torch.save writes them


def shorter(before: dict, now: dict, progress: dict) -> list[str]:
    """How the wished length is below that of the run so far, in words. Longer is allowed: train on."""
    steps, epochs = _length(now, "max_steps"), _length(now, "num_train_epochs")
    if steps:
        return [f"max_steps: {progress['max_steps']} -> {steps}"] if steps < progress["max_steps"] else []
    if _length(before, "max_steps"):
        return [f"max_steps: {progress['max_steps']} -> none"]
    old = _length(before, "num_train_epochs")
    return [f"num_train_epochs: {old} -> {epochs}"] if epochs < old else []


def state(checkpoint: Path) -> dict:
    """trainer_state.json. InputError if it is missing or broken."""
    existing(checkpoint, "checkpoint")
    progress = _read(checkpoint / "trainer_state.json")
    if progress is None or not all(type(progress.get(k)) is int for k in ("global_step", "max_steps")):
        raise InputError(f"{checkpoint}: no whole trainer_state.json; take an earlier checkpoint")
    return progress


def cut_log(path: Path, step: int) -> None:
    """Remove the lines of steps after `step` from a log: the run comes by there again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            done = int(json.loads(line)["global_step/max_steps"].split("/")[0])
        except (ValueError, KeyError, TypeError, AttributeError):
            done = 0 if step else 1  # a run's last line has no step
        if done <= step and line.endswith("\n"):
            kept.append(line)
    with files.atomic(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _rest(found: dict) -> dict:
    return {key: value for key, value in found.items() if key not in LENGTH}


def _length(found: dict, key: str) -> float:
    value = found.get(key)
    unset = {"max_steps": 0, "num_train_epochs": 3}[key]  # ms-swift's
    return value if isinstance(value, int | float) and value > 0 else unset


def _read(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
