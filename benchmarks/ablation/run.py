"""What each part of the recipe is worth: all arms from one vanilla head, on as many steps.

All are measured on the same answers. An arm is the data it learns from and the recipe keys in which it
differs (configs/ablation.yaml). Every arm is a folder of its own: a second call keeps what is finished,
unless something that it depends on has changed, and several processes may each train some of them (`--arms`).

    python -m benchmarks.ablation.run --model models/smollm2 --self-data data/smollm2/train.jsonl \\
        --source-data data/smollm2/source.jsonl --held-out data/smollm2/eval.jsonl --answers answers.jsonl \\
        --out results/ablation
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.ablation.table import report, tables
from fastmtp import files
from fastmtp.checkpoint import head_folder, head_state, read_head, save_head
from fastmtp.cli import InputError, Parser, run
from fastmtp.data.recipe import HEAD_KEYS, apply_overrides, complete, with_base
from fastmtp.data.samples import check_measurable, read_samples
from fastmtp.export import export
from fastmtp.fingerprint import differences, fingerprint, machine
from fastmtp.formats.weights import weight_files
from fastmtp.formats.yaml_file import read_mapping
from fastmtp.inputs import existing, read_json, read_jsonl, resource
from fastmtp.reference.model import head_for, load, put_head
from fastmtp.reference.teacher_forced import measure_at
from fastmtp.train import check, swift_keys, train

STEPS = (1, 3, 5, 7)
VANILLA = "vanilla"
DATA = ("source", "self")
KEYS = ("recipe", "arms", "leave_out")
PARTS = ("start", "run", "head", "result.json")  # what an arm's folder holds, beside ARM and its record
ARM = "arm.json"  # what the arm's training depends on


def read_config(path: str | Path) -> dict:
    """{"recipe": keys of all arms, "arms": {name: {"about", "data", keys of its own}}, "leave_out": sources}.

    InputError for unknown keys, an arm without `about` or with other data than `source` or `self`.
    """
    config = {"leave_out": []} | read_mapping(resource(path), "list of arms")
    for key in config:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key '{key}'; it holds {', '.join(KEYS)}")
    for key in ("recipe", "arms"):
        if not isinstance(config.get(key), dict):
            raise InputError(f"{path}: '{key}' must be a block; see configs/ablation.yaml")
    config["recipe"] = with_base(config["recipe"], resource(path))
    for name, arm in config["arms"].items():
        if not isinstance(arm, dict) or arm.get("data") not in DATA or not arm.get("about"):
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
    return complete(apply_overrides(recipe, overrides), f"arm '{name}'")


def perform(name: str, recipe: dict, start: str, about: str, args, known: set[str]) -> None:
    """Train one arm from head `start` unless it is finished, keep its head in bfloat16, measure it.

    Leaves NAME/result.json (figures), NAME/head and NAME/run (logs, the best checkpoint).
    """
    folder, depends = own_folder(Path(args.out) / name), depends_on(recipe, start, args)
    if finished(folder, depends | measured_with(args), name):
        return
    before = read_json(folder / ARM) if (folder / ARM).exists() else {}
    if before != depends:  # another training: nothing of the old one may be taken for it
        clear(folder)
        files.write_json(folder / ARM, depends)
    if not (folder / "start").exists():
        export(args.model, start, folder / "start")
    check(recipe, known, f"arm '{name}'")
    print(f"[{name}] {about}", flush=True)
    train(recipe)
    keep_head(folder / "run" / "best-checkpoint", folder / "head")
    facts = {"arm": name, "about": about, "recipe": recipe, **training_facts(folder / "run")}
    measure_arm(folder, facts, depends | measured_with(args), args)
    shutil.rmtree(folder / "start")


def given(name: str, start: str, about: str, args) -> None:
    """The arm that needs no training: a head trained before, measured like the others."""
    folder, depends = own_folder(Path(args.out) / name), depends_on({}, start, args) | measured_with(args)
    if not finished(folder, depends, name):
        keep_head(start, folder / "head")
        measure_arm(folder, {"arm": name, "about": about, "recipe": None, "curve": []}, depends, args)


def own_folder(folder: Path) -> Path:
    """An arm's folder, claimed for this process. InputError if it holds something that is not ours."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not files.is_ours(folder):
        raise InputError(f"{folder}: holds other files; give another --out or move them away")
    files.claim(folder, folder=True)
    return folder


def clear(folder: Path) -> None:
    """Remove what an earlier training of the arm left, and nothing else."""
    others = (files.read_record(folder / "run.json") or {}).get("others", [])
    for path in [folder / part for part in PARTS if part not in others]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def depends_on(recipe: dict, start: str, args) -> dict:
    """What an arm's training depends on: the model, the head it starts from, its data, its recipe."""
    contents = {"model": args.model, "start": weight_files(head_folder(start))}
    settings = {key: value for key, value in recipe.items() if key not in ("model", "dataset", "output_dir")}
    if recipe:
        contents |= {"data": recipe["dataset"], "held out": args.held_out}
        head = {key: value for key, value in recipe["model_kwargs"].items() if key != "mtp_eval_data"}
        settings |= {"model_kwargs": head, "external_plugins": None}  # where the package lies is no matter
    return fingerprint(contents, settings)


def measured_with(args) -> dict:
    """What an arm's figures depend on beside its training."""
    return fingerprint(
        {"answers": args.answers},
        {"dtype": args.dtype, "left out": args.leave_out, "steps measured": STEPS} | machine(),
    )


def finished(folder: Path, depends: dict, name: str) -> bool:
    """Whether the arm's result is of the same training and measurement; says so, or what has changed."""
    if not (folder / "result.json").exists():
        return False
    changed = differences(read_json(folder / "result.json").get("fingerprint") or {}, depends)
    print(f"[{name}] {'done again: ' + '; '.join(changed) if changed else 'finished before'}", flush=True)
    return not changed


def measure_arm(folder: Path, facts: dict, depends: dict, args) -> None:
    tau = figures(args.model, folder / "head", args.answers, args.leave_out, args.dtype)
    files.write_json(folder / "result.json", facts | {"fingerprint": depends} | tau)
    files.write_provenance(folder, {"arm": facts["arm"], "about": facts["about"]}, facts=depends)


def keep_head(checkpoint: str | Path, out: Path) -> None:
    """The head of a checkpoint in bfloat16, as `--head` takes it."""
    with files.atomic(out) as folder:
        folder.mkdir()
        head = {
            name: tensor.to(torch.bfloat16).contiguous() for name, tensor in read_head(checkpoint).items()
        }
        save_head(folder, head, head_state(checkpoint))
        files.write_provenance(folder, {"checkpoint": str(Path(checkpoint).resolve().name)})


def training_facts(run_folder: Path) -> dict:
    """Optimiser steps, seconds, tokens read and the curve of tau on held-out samples, from ms-swift's log."""
    rows = [row for _, row in read_jsonl(run_folder / "logging.jsonl")]
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
    put_head(model.net, head, head_for(head, model.net.config))
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
        "    --source-data data/smollm2/source.jsonl --held-out data/smollm2/eval.jsonl \\\n"
        "    --answers answers.jsonl --out results/ablation --arms vanilla,self,exact --max_steps 400",
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
        existing(path)
    for path in tables(Path(args.out)):
        files.check_output(path)
    read_head(args.model)
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
