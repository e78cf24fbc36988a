"""Fine-tune the head: check a recipe and every training row, then run `swift sft` with our plugin.

A recipe is an ms-swift YAML; the head's settings are its `model_kwargs` (modeling_mimo.MiMoConfig's mtp_*),
`base` names the recipe that it completes, and what any head needs is added (data/recipe.py). With
`mtp_eval_data`, held-out samples of which `mtp_eval_limit` are used, tau is measured at every checkpoint, and
the link `best-checkpoint` keeps the best; `mtp_compile: true` compiles the layers. Overrides are flags of the
same names. An unknown key is an error.

The same command continues from the last checkpoint of an earlier one. With another recipe, other data or
another model it is refused; `--overwrite true` starts over.

    python -m fastmtp.train configs/mimo7b_k3.yaml --learning_rate 1e-4 --mtp_num_steps 5
    NPROC_PER_NODE=8 python -m fastmtp.train configs/mimo7b_k3.yaml
"""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

import fastmtp
from fastmtp import files
from fastmtp.checkpoint import read_head
from fastmtp.cli import InputError, Parser, run
from fastmtp.data import encoded_rows, training_run
from fastmtp.data.recipe import apply_overrides, complete, merge, read_recipe
from fastmtp.data.recipe_check import (
    check_head,
    check_keys,
    check_numbers,
    check_warmup,
    takes_flash_attn,
)
from fastmtp.data.rendering import check_template
from fastmtp.data.samples import check_measurable, read_samples
from fastmtp.data.start_up import StartUp
from fastmtp.data.training_rows import Rules
from fastmtp.data.training_run import Start, names, processes
from fastmtp.data.training_set import TrainingSet, is_local, shuffled, split_count, write_set
from fastmtp.inputs import existing, read_json
from fastmtp.swift_process import RECIPE, launch, stop
from fastmtp.tokenizer import load_tokenizer

HUB = re.compile(r"((hf|ms)::)?[\w.-]+/[\w.-]+(:[^#]*)?(#\d+)?", re.IGNORECASE)  # as ms-swift writes it
NEEDED = ("model", "dataset", "output_dir", "model_kwargs")
MAX_DROPPED = 0.1
DATA_SEED = 42  # ms-swift's, and its 3 epochs


def check(recipe: dict, known: set[str], place: str) -> None:
    """InputError for unknown or missing keys, bad values, a model without a head, missing data files."""
    check_keys(recipe, known, place)
    for key in NEEDED:
        if not recipe.get(key):
            raise InputError(f"{place}: the key '{key}' is missing; see configs/quickstart.yaml")
    check_numbers(recipe, place)
    check_warmup(recipe, place)
    check_head(recipe["model_kwargs"], place)
    for key in ("model", "output_dir"):
        if not isinstance(recipe[key], str):
            raise InputError(f"{place}: '{key}' must be a path, not {recipe[key]!r}")
    for key in ("dataset", "val_dataset"):
        for name in names(recipe, key):
            if not isinstance(name, str):
                raise InputError(f"{place}: '{key}' must be paths, not {name!r}")
            if not is_local(name) and not HUB.fullmatch(name):
                raise InputError(f"{place}: {name!r} ('{key}') is neither a file nor a data set on a hub")
            if is_local(name):
                existing(split_count(name)[0], f"file ('{key}' in {place})")
    if not isinstance(recipe.get("columns") or {}, dict):
        raise InputError(f"{place}: 'columns' must be a block such as {{prompt: query}}")
    if "mtp_eval_data" in recipe["model_kwargs"]:
        if recipe.get("val_dataset"):
            raise InputError(
                f"{place}: mtp_eval_data picks the best checkpoint by tau, val_dataset by loss; leave one out"
            )
        existing(recipe["model_kwargs"]["mtp_eval_data"], f"file ('mtp_eval_data' in {place})")
    read_head(recipe["model"])


def read_data(recipe: dict, max_dropped: float) -> dict[str, TrainingSet]:
    """{"dataset": its local rows, "val_dataset": likewise}, encoded; what is left out is printed.

    Raises InputError if too many rows are left out, or too few are left to train on.
    """
    tokenizer = load_tokenizer(recipe["model"])
    if tokenizer.eos_token_id is None:
        raise InputError(f"{recipe['model']}: its tokenizer has no end-of-turn token; set eos_token there")
    check_template(tokenizer, recipe["model"])
    config = read_json(Path(recipe["model"]) / "config.json")
    vocab_size = min(config["vocab_size"], len(tokenizer))
    max_length = int(recipe.get("max_length") or config["max_position_embeddings"])
    truncation = recipe.get("truncation_strategy") or "delete"
    longest = max(map(len, tokenizer.get_vocab()))  # composing accents shortens a text, but not to a quarter
    rules = Rules(
        vocab_size,
        max_length,
        truncation,
        recipe.get("columns") or {},
        recipe.get("system"),
        4 * longest * max_length if truncation == "delete" else None,
    )
    sets = {}
    for key in ("dataset", "val_dataset"):
        local = [name for name in names(recipe, key) if is_local(name)]
        if local:
            rows = encoded_rows.read_kept(
                encoded_rows.kept_at(recipe["output_dir"], key),
                local,
                recipe["model"],
                tokenizer,
                rules,
                int(recipe.get("dataset_num_proc") or 1),
            )
            if rows.left_out == len(rows.encoded):
                raise InputError(f"{', '.join(local)}: no row can be trained on: {rows.summary()}")
            if rows.left_out > max_dropped * len(rows.encoded):
                raise InputError(
                    f"{', '.join(local)}: {rows.summary()}; more than {max_dropped:.0%} is too much: "
                    "fix the rows, or allow it with --max-dropped SHARE"
                )
            print(f"{', '.join(local)}: {rows.summary()}", flush=True)
            sets[key] = rows
    if set(names(recipe, "dataset")) == {name for name in names(recipe, "dataset") if is_local(name)}:
        check_enough(recipe, sets["dataset"])
    if "mtp_eval_data" in recipe["model_kwargs"]:
        path, limit = recipe["model_kwargs"]["mtp_eval_data"], recipe["model_kwargs"].get("mtp_eval_limit")
        check_measurable(path, read_samples(path, config["vocab_size"], limit, tokenizer))
    return sets


def check_enough(recipe: dict, rows: TrainingSet) -> None:
    """InputError if a process would get no row of its own, or no batch would be full."""
    count, what = sum(1 for _ in rows.sequences()), "row"
    if recipe.get("packing"):
        count = -(-rows.tokens // int(recipe.get("packing_length") or recipe["max_length"]))
        what = "packed row"
    needed = processes()
    if recipe.get("dataloader_drop_last"):
        needed *= int(recipe.get("per_device_train_batch_size") or 1)
    if count < needed:
        raise InputError(
            f"{', '.join(names(recipe, 'dataset'))}: {count} {what}{'s' * (count != 1)} for {needed} "
            "places in a step; give more rows, or train with fewer processes (NPROC_PER_NODE)"
        )


def train(
    recipe: dict,
    overwrite: bool = False,
    max_dropped: float = MAX_DROPPED,
    start_up: StartUp | None = None,
) -> None:
    """Run `swift sft` on a checked recipe, from where an earlier run stopped. SystemExit(1) if it fails."""
    output, start_up = Path(recipe["output_dir"]), start_up or StartUp()
    training_run.check_ours(output)
    start_up.lap("imports")
    with (
        tempfile.TemporaryDirectory(prefix="fastmtp-train-") as folder,
        launch(recipe, Path(folder)) as process,
    ):
        sets = read_data(recipe, max_dropped)
        start = training_run.begin(recipe, overwrite)
        if start.finished:
            print(f"{start.checkpoint}: this training is finished ({start.step} steps); 0 steps done now")
        else:
            if start.checkpoint:
                print(f"{start.checkpoint}: continued from step {start.step}", flush=True)
            encoded_rows.keep(output, sets)
            flash_attn = takes_flash_attn(recipe)
            recipe = merge(recipe, {"model_kwargs": {"mtp_flash_attn": flash_attn}})
            if flash_attn:
                print("attention: FlashAttention 4 (mtp_flash_attn: false for torch's kernels)", flush=True)
            code = run_swift(recipe, sets, start, Path(folder), process, start_up)
    if not start.finished:
        if code == errno.ENOSPC:
            raise files.full(output)
        if code:
            print(
                f"fastmtp.train: `swift sft` ended with code {code}; its own messages are above",
                file=sys.stderr,
            )
            raise SystemExit(1)
        if not training_run.checkpoints(output):
            print(f"fastmtp.train: error: {output}: the training made no checkpoint", file=sys.stderr)
            raise SystemExit(1)
    check_learnt(
        recipe["model"], start.checkpoint if start.finished else training_run.checkpoints(output)[-1]
    )
    encoded_rows.forget(output, sets)
    recorded = "fingerprint" in (files.read_record(output / "run.json") or {})
    if int(os.environ.get("NODE_RANK") or 0) == 0 and not (start.finished and recorded):
        local = [name for name in names(recipe, "dataset") if is_local(name)]
        files.write_provenance(output, recipe, local, start.found)


def check_learnt(model: str, checkpoint: Path) -> None:
    """InputError if the head of a checkpoint is still, bit for bit, the one that it began with."""
    before, after = read_head(model), read_head(checkpoint)
    if all(torch.equal(before[name].to(tensor.dtype), tensor) for name, tensor in after.items()):
        raise InputError(
            f"{checkpoint}: not one weight changed, so nothing was learnt; check learning_rate and warmup, "
            "then start over with --overwrite true"
        )


def run_swift(
    recipe: dict,
    sets: dict[str, TrainingSet],
    start: Start,
    folder: Path,
    process: subprocess.Popen,
    start_up: StartUp,
) -> int:
    """Write what ms-swift reads into `folder`, for whose recipe `process` waits, and give its exit code."""
    needs = {
        "mtp_start_up": True,
        "mtp_tau": "mtp_eval_data" in recipe["model_kwargs"],
        "mtp_gather": recipe.get("fsdp"),
    }
    added = [name for name, needed in needs.items() if needed]
    recipe = {**recipe, "resume_from_checkpoint": str(start.checkpoint) if start.checkpoint else None}
    recipe["callbacks"] = [*names(recipe, "callbacks"), *added]
    if "mtp_tau" in added and recipe.get("save_total_limit") == 1:
        recipe["save_total_limit"] = 2  # the best and the last: of one, transformers keeps the best alone
    for key, rows in sets.items():
        data = names(recipe, key)
        order = None
        if recipe.get("dataset_shuffle", True) if key == "dataset" else recipe.get("val_dataset_shuffle"):
            order = shuffled(len(rows.encoded), recipe.get("data_seed", DATA_SEED), len(data))
        write_set(rows.sequences(order), folder / key)
        recipe["cached_" + key] = [str(folder / key)]
        recipe[key] = [name for name in data if not is_local(name)]
    recipe.setdefault("disable_tqdm", not sys.stderr.isatty())  # a log file gets its lines without a bar
    # persistent workers take 5 s each to end; a process that is not forked imports everything again to pack
    recipe.setdefault("dataloader_persistent_workers", False)
    recipe.setdefault("dataloader_multiprocessing_context", "fork")
    if recipe.get("max_steps") == 1:
        recipe |= {"warmup_ratio": None, "warmup_steps": None}  # the first step of a warmup has the rate 0
    resolved = folder / "resolved.yaml"
    recipe = {key: value for key, value in recipe.items() if value not in (None, [])}
    resolved.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    start_up.lap("rows")
    start_up.write(folder)
    os.replace(resolved, folder / RECIPE)
    try:
        return process.wait()
    except KeyboardInterrupt:
        stop(process, begun=True)
        done = training_run.checkpoints(Path(recipe["output_dir"]))
        go_on = f"continues from {done[-1]}" if done else "starts again: there is no checkpoint yet"
        print(f"fastmtp.train: interrupted; the same command {go_on}", file=sys.stderr)
        raise SystemExit(1) from None


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.train",
        "Fine-tune the head on a recipe through `swift sft`. Further flags override the recipe's keys.",
        "python -m fastmtp.train configs/mimo7b_k3.yaml --learning_rate 1e-4 --mtp_num_steps 5",
    )
    p.allow_abbrev = False
    p.add_argument(
        "recipe", nargs="?", default="configs/mimo7b_k3.yaml", help="YAML (default configs/mimo7b_k3.yaml)"
    )
    p.add_argument("--print", action="store_true", help="show the whole recipe, its base included, and stop")
    p.add_argument(
        "--overwrite",
        nargs="?",
        const="true",
        choices=("true", "false"),
        help="true: start over, and remove the checkpoints of an earlier run in output_dir",
    )
    p.add_argument(
        "--max-dropped",
        type=float,
        default=MAX_DROPPED,
        metavar="SHARE",
        help="stop if a larger share of the rows cannot be trained on (default %(default)s)",
    )
    return p


def swift_keys() -> set[str]:
    """Names that `swift sft` accepts. InputError without ms-swift."""
    logging.disable(logging.INFO)  # ms-swift logs a line when it is imported
    try:
        from fastmtp.swift_plugin import swift_keys
    except ImportError as error:
        raise InputError(f"ms-swift cannot be imported ({error}); run: pip install -e '.[train]'") from None
    finally:
        logging.disable(logging.NOTSET)
    return swift_keys()


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    p = parser()
    if not words or words[0].startswith("-"):  # or argparse takes an override's value for the recipe
        words.insert(0, p.get_default("recipe"))
    words = [word.replace("--max_dropped", "--max-dropped") for word in words]
    args, overrides = p.parse_known_args(words)
    if not 0 <= args.max_dropped <= 1:
        raise InputError(f"--max-dropped must be a share from 0 to 1, not {args.max_dropped}")
    recipe = complete(apply_overrides(read_recipe(args.recipe), overrides), args.recipe)
    if args.print:
        print(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), end="")
        return
    check(recipe, swift_keys(), args.recipe)
    train(recipe, args.overwrite == "true", args.max_dropped, StartUp(fastmtp.BEGAN))


if __name__ == "__main__":
    run(main)
