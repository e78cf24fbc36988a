"""What each part of the recipe is worth: every arm from the same vanilla head, on as many steps, measured on
the same answers.

An arm is the data it learns from and the recipe keys in which it differs (configs/ablation.yaml). Every arm
is a folder
of its own: a second call keeps what is finished, and several processes may each train some of them
(`--arms`).

    python -m benchmarks.ablation.run --model models/smollm2 --self-data data/smollm2/train.jsonl \\
        --source-data data/smollm2/source.jsonl --held-out data/smollm2/eval.jsonl --answers answers.jsonl --out results/ablation
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.ablation.table import report
from fastmtp import files
from fastmtp.acceptance import measure_at
from fastmtp.checkpoint import read_head
from fastmtp.cli import InputError, Parser, run
from fastmtp.data.samples import check_measurable, read_samples
from fastmtp.export import export
from fastmtp.model import head_for, load
from fastmtp.train import HEAD_KEYS, apply_overrides, check, train
from fastmtp.yaml_file import read_mapping

STEPS = (1, 3, 5, 7)
VANILLA = "vanilla"
DATA = ("source", "self")
KEYS = ("recipe", "arms", "leave_out")


def read_config(path: str | Path) -> dict:
    """{"recipe": keys of all arms, "arms": {name: {"about", "data", keys of its own}}, "leave_out": sources}.

    InputError for unknown keys, an arm without `about` or with other data than `source` or `self`.
    """
    config = {"leave_out": []} | read_mapping(path, "recipe")
    for key in config:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key '{key}'; it holds {', '.join(KEYS)}")
    for name, arm in config["arms"].items():
        if arm.get("data") not in DATA or not arm.get("about"):
            raise InputError(
                f"{path}: arm '{name}' needs `about`, a few words, and `data`, one of {', '.join(DATA)}"
            )
    return config


def resolve(config: dict, name: str, args, overrides: Sequence[str]) -> dict:
    """The complete recipe of one arm; its start model and output lie in its folder."""
    arm, folder = config["arms"][name], Path(args.out) / name
    own = {key: value for key, value in arm.items() if key not in ("about", "data")}
    head = {key: own.pop(key) for key in list(own) if key in HEAD_KEYS}
    recipe = {
        **config["recipe"],
        **own,
        "model": str(folder / "start"),
        "dataset": [getattr(args, f"{arm['data']}_data")],
        "output_dir": str(folder / "run"),
        "model_kwargs": {**config["recipe"]["model_kwargs"], **head, "mtp_eval_data": args.held_out},
    }
    return apply_overrides(recipe, overrides)


def perform(name: str, recipe: dict, start: str, about: str, args, known: set[str]) -> None:
    """Train one arm from head `start` unless it is finished, keep its head in bfloat16, measure it.

    Leaves NAME/result.json (figures), NAME/head and NAME/run (logs, the best checkpoint).
    """
    folder = Path(args.out) / name
    head = read_head(start)
    key = digest(recipe, head, recipe["dataset"])
    done = folder / "result.json"
    if done.exists() and files.read_json(done)["key"] == key:
        print(f"[{name}] finished before", flush=True)
        return
    mark = folder / "key"
    if not mark.exists() or mark.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(key)
    if not (folder / "start").exists():
        export(args.model, start, folder / "start")
    check(recipe, known, f"arm '{name}'")
    print(f"[{name}] {about}", flush=True)
    last = folder / "run" / "last-checkpoint"
    train({**recipe, "resume_from_checkpoint": str(last)} if last.exists() else recipe)
    keep_head(folder / "run" / "best-checkpoint", folder / "head")
    result = {"arm": name, "about": about, "key": key, "recipe": recipe, **training_facts(folder / "run")}
    files.write_json(
        done, result | figures(args.model, folder / "head", args.answers, args.leave_out, args.dtype)
    )
    shutil.rmtree(folder / "start")


def given(name: str, start: str, about: str, args) -> None:
    """The arm that needs no training: a head trained before, measured like the others."""
    folder = Path(args.out) / name
    key = digest({}, read_head(start), [])
    if (folder / "result.json").exists() and files.read_json(folder / "result.json")["key"] == key:
        return
    keep_head(start, folder / "head")
    facts = {"arm": name, "about": about, "key": key, "recipe": None, "curve": []}
    files.write_json(
        folder / "result.json",
        facts | figures(args.model, folder / "head", args.answers, args.leave_out, args.dtype),
    )


def digest(recipe: dict, head: dict[str, torch.Tensor], data: list[str]) -> str:
    """A tag of all that decides an arm's outcome: its recipe, its start, its data."""
    tag = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name in sorted(head):
        tag.update(head[name].contiguous().view(torch.uint8).numpy().tobytes())
    for path in data:
        tag.update(files.sha256(path).encode())
    return tag.hexdigest()[:16]


def keep_head(checkpoint: str | Path, out: Path) -> None:
    """The head of a checkpoint in bfloat16, as `--head` takes it."""
    with files.atomic(out) as folder:
        folder.mkdir()
        head = {
            name: tensor.to(torch.bfloat16).contiguous() for name, tensor in read_head(checkpoint).items()
        }
        save_file(head, folder / "model.safetensors", metadata={"format": "pt"})
        files.write_provenance(folder, {"checkpoint": str(Path(checkpoint).resolve().name)})


def training_facts(run_folder: Path) -> dict:
    """Optimiser steps, seconds, tokens read and the curve of tau on held-out samples, from ms-swift's log."""
    rows = [row for _, row in files.read_jsonl(run_folder / "logging.jsonl")]
    steps = {
        id(row): int(row["global_step/max_steps"].split("/")[0])
        for row in rows
        if "global_step/max_steps" in row
    }
    curve = [
        {"step": steps[id(row)]} | {k: v for k, v in row.items() if k.startswith("eval_")}
        for row in rows
        if "eval_tau" in row
    ]
    return {
        "steps": max(steps.values()),
        "seconds": sum(row.get("train_runtime", 0.0) for row in rows),
        "tokens": max((row.get("num_input_tokens_seen", 0) for row in rows), default=0),
        "epochs": max((row.get("epoch", 0.0) for row in rows), default=0.0),
        "curve": curve,
    }


def figures(base: str, head: Path, answers: str, leave_out: list[str], dtype: str) -> dict:
    """{"tau": {K: {source: {...}}}}: counts of each source on the benchmark answers, samples kept for paired
    intervals.
    """
    model = load(base, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    model.net.load_head(head_for(head, model.net.config))
    samples = [s for s in read_samples(answers, model.net.vocab_size) if s.get("source", "") not in leave_out]
    check_measurable(answers, samples)
    return {
        "tau": {
            str(steps): {
                source: {"histogram": part.histogram, "samples": part.samples}
                for (source, _, _), part in sorted(results.items())
            }
            for steps, results in measure_at(model, samples, STEPS).items()
        }
    }


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.ablation.run",
        "Train every arm of an ablation and print the table. Further flags override recipe keys of all arms.",
        "python -m benchmarks.ablation.run --model models/smollm2 --self-data data/smollm2/train.jsonl \\\n"
        "    --source-data data/smollm2/source.jsonl --held-out data/smollm2/eval.jsonl --answers answers.jsonl \\\n"
        "    --out results/ablation --arms vanilla,self,exact --max_steps 400",
    )
    p.add_argument(
        "--config", default="configs/ablation.yaml", help="arms and their common recipe (default %(default)s)"
    )
    p.add_argument("--model", required=True, help="model folder; `vanilla` is trained from its head")
    p.add_argument(
        "--vanilla", help="a finished vanilla head (checkpoint, model or shipped head): do not train one"
    )
    p.add_argument("--self-data", required=True, help="the model's own answers, from fastmtp.curate")
    p.add_argument("--source-data", required=True, help="the same prompts with their source's responses")
    p.add_argument(
        "--held-out", required=True, help="samples for tau at every checkpoint, from fastmtp.curate"
    )
    p.add_argument(
        "--answers", required=True, help="the model's greedy answers to the benchmarks, from fastmtp.distill"
    )
    p.add_argument("--out", required=True, help="folder for the arms, table.md and table.json")
    p.add_argument("--arms", help="only these, such as vanilla,self,exact (default all)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the measurement")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args, overrides = parser().parse_known_args(argv)
    config = read_config(args.config)
    args.leave_out = config["leave_out"]
    arms = args.arms.split(",") if args.arms else list(config["arms"])
    for name in arms:
        if name not in config["arms"]:
            raise InputError(f"--arms: no arm '{name}' in {args.config}; it has {', '.join(config['arms'])}")
    for path in (args.self_data, args.source_data, args.held_out, args.answers):
        files.existing(path)
    read_head(args.model)
    logging.disable(logging.INFO)  # ms-swift logs a line when it is imported
    from fastmtp.swift_plugin import swift_keys

    logging.disable(logging.NOTSET)
    known = swift_keys()
    start = Path(args.out) / VANILLA / "head"
    if args.vanilla:
        given(VANILLA, args.vanilla, config["arms"][VANILLA]["about"], args)
    elif VANILLA not in arms and not start.exists():
        raise InputError(
            f"{start}: no vanilla head to start from; train the arm '{VANILLA}' first, or give --vanilla"
        )
    for name in arms:
        if name == VANILLA and args.vanilla:
            continue
        recipe = resolve(config, name, args, overrides)
        perform(
            name,
            recipe,
            args.model if name == VANILLA else str(start),
            config["arms"][name]["about"],
            args,
            known,
        )
    print(report(Path(args.out), list(config["arms"])))


if __name__ == "__main__":
    run(main)
