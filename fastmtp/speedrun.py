"""From a raw model to the paper's table, on 1 to N GPUs of one machine, in one command.

prepare -> distil (an engine on every GPU) -> curate -> start of a fresh head -> token maps -> train (DDP)
-> export -> acceptance on held-out answers -> evaluate -> report -> losslessness in float32. Every stage is a
command that you can run by itself; `--dry-run` prints them all. A finished stage is reused while its command
and the content of what it reads are the same; an interrupted one continues with the same command.

    python -m fastmtp.speedrun --model Qwen/Qwen2.5-1.5B-Instruct --data configs/data/local.yaml \\
        --questions bench --out runs/qwen
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmtp import files, train
from fastmtp.cli import InputError, Parser, at_least, run, split_at_dashes
from fastmtp.data.recipe import apply_overrides, complete, read_recipe
from fastmtp.data.recipe_check import check_head, check_keys, check_numbers, check_warmup
from fastmtp.data.sources import DataConfig
from fastmtp.engines.sglang import sglang_version
from fastmtp.formats.yaml_file import load_yaml
from fastmtp.inputs import existing, numbered_lines, read_json, resource, shipped
from fastmtp.pipeline import estimate, stages
from fastmtp.pipeline import speedrun_stages as plans
from fastmtp.pipeline.processes import StageFailed, in_process
from fastmtp.show.markdown import number
from fastmtp.vocab.lang import LANGUAGES

SET_HERE = ("model", "dataset", "output_dir", "mtp_eval_data", "val_dataset")
# The whole path on the CPU in minutes: a handful of prompts and steps, our own decoder in the engines' place.
SMOKE = {"data": ["configs/data/examples.yaml"], "questions": "examples/questions", "model": "smollm2"}
SMOKE |= {"recipe": "configs/quickstart.yaml", "prompts": 24, "max_new_tokens": 24, "num_questions": 1}
SMOKE |= {"tasks": "mt_bench,math_500", "gpus": 0}
SMOKE_FLAGS = ["--max_steps", "4", "--logging_steps", "1", "--mtp_eval_limit", "4"]
DEFAULTS = {"recipe": "configs/speedrun.yaml", "num_questions": 40, "tasks": "all"}


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.speedrun",
        "A raw model, distilled, trained, exported and measured. Further flags override the recipe's keys; "
        "flags after -- go to every engine.",
        "python -m fastmtp.speedrun --model Qwen/Qwen2.5-1.5B-Instruct --data configs/data/local.yaml \\\n"
        "    --questions bench --prompts 40000 --max-new-tokens 512 --out runs/qwen --learning_rate 1e-4",
    )
    p.allow_abbrev = False
    p.add_argument("--model", help="a Hub repository, a folder or a .gguf file (--smoke: smollm2)")
    p.add_argument(
        "--data",
        nargs="+",
        type=shipped,
        help="data set list (configs/data/*.yaml), or jsonl files with `prompt` or `messages`",
    )
    p.add_argument(
        "--questions",
        type=shipped,
        metavar="FOLDER",
        help="question files TASK*.jsonl: evaluated on, and kept out of the training data",
    )
    p.add_argument("--out", required=True, metavar="FOLDER", help="everything that is made")
    p.add_argument("--prompts", type=int, metavar="N", help="so many prompts, by the list's shares (all)")
    p.add_argument("--max-new-tokens", type=int, help="longest answer to distil (default: the list's)")
    p.add_argument("--recipe", type=shipped, help=f"of training (default {DEFAULTS['recipe']})")
    p.add_argument("--tasks", help="benchmarks to evaluate (default all)")
    p.add_argument("--arms", help="arms to evaluate (default: the paper's, K=1 to 5, every token map)")
    p.add_argument("--num-questions", type=int, help="per benchmark (default 40)")
    p.add_argument("--gpus", type=int, help="how many to use (default: all that are visible)")
    p.add_argument(
        "--until", choices=plans.NAMES, metavar="STAGE", help=f"stop after {', '.join(plans.NAMES)}"
    )
    p.add_argument("--dry-run", action="store_true", help="print every command, time and disk; do nothing")
    p.add_argument("--smoke", action="store_true", help="the whole path on the CPU with a handful of prompts")
    return p


def visible_gpus() -> int:
    """GPUs that this process may use, without making a context on one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() not in ("", "-1")])
    try:
        query = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return len(query.stdout.splitlines())


def plan_of(args, overrides: list[str], flags: list[str]) -> plans.Plan:
    """What is asked for, checked before the first stage. Raises InputError."""
    at_least(args, 1, "prompts", "max_new_tokens", "num_questions", "gpus")
    for name, value in {**DEFAULTS, **(SMOKE if args.smoke else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, what in (("model", "a model"), ("data", "a data set list"), ("questions", "question files")):
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing; give {what}, or --smoke for a trial on the CPU")
    gpus = visible_gpus() if args.gpus is None else args.gpus
    if gpus == 0 and not (args.smoke or args.dry_run):
        raise InputError("no GPU is visible; try --smoke, which runs on the CPU, or --dry-run")
    overrides, train_flags = split_overrides([*(SMOKE_FLAGS if args.smoke else []), *overrides])
    recipe = complete(apply_overrides(read_recipe(args.recipe), overrides), args.recipe)
    check_recipe(recipe, overrides, args.recipe)
    processes = max(1, gpus) * int(os.environ.get("NNODES") or 1)
    return plans.Plan(
        model=args.model,
        data=[str(resource(path)) for path in args.data],
        questions=str(existing(resource(args.questions), "folder of question files")),
        out=Path(args.out),
        gpus=gpus,
        recipe=args.recipe,
        recipe_flags=overrides,
        train_flags=train_flags,
        steps=recipe["model_kwargs"].get("mtp_num_steps", 3),
        accumulation=recipe.get("gradient_accumulation_steps", 1),
        processes=processes,
        languages=languages(args.data),
        prompts=args.prompts,
        max_new_tokens=args.max_new_tokens,
        num_questions=args.num_questions,
        tasks=args.tasks,
        arms=args.arms,
        flags=flags,
        smoke=args.smoke,
    )


def split_overrides(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Overrides of the recipe's keys, and the training command's own flags among them."""
    own, rest = train.parser().parse_known_args(["RECIPE", *overrides])
    flags = ["--overwrite", own.overwrite] if own.overwrite else []
    if own.max_dropped != train.MAX_DROPPED:
        flags += ["--max-dropped", str(own.max_dropped)]
    return rest, flags


def check_recipe(recipe: dict, overrides: list[str], place: str) -> None:
    """InputError for what training would refuse hours later."""
    for word in overrides:
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and key in SET_HERE:
            raise InputError(f"{word}: is set by this command; leave it out")
    check_keys(recipe, train.swift_keys(), place)
    check_numbers(recipe, place)
    check_warmup(recipe, place)
    check_head(recipe["model_kwargs"], place)


def languages(data: list[str]) -> list[str]:
    """Languages to make token maps for: of the prompts, as far as scripts tell them apart. InputError."""
    paths = [existing(resource(path)) for path in data]
    if paths[0].suffix not in (".yaml", ".yml"):
        return ["en"]
    if len(paths) > 1:
        raise InputError(f"{paths[1]}: one data set list is enough; name all sources there")
    listed = load_yaml(paths[0], DataConfig)
    listed.check(str(paths[0]))
    for source in listed.sources:
        if source.path:
            existing(resource(source.path), f"file (source '{source.name}' in {paths[0]})")
    return sorted({s.lang for s in listed.sources if s.lang in LANGUAGES}) or ["en"]


def check_questions(plan: plans.Plan) -> None:
    """InputError for a benchmark that has no question file, or one that cannot be asked."""
    evaluation = importlib.import_module("evaluation.plan")  # the package itself knows nothing of evaluation
    for task in evaluation.parse_tasks(plan.tasks):
        path = evaluation.question_file(plan.questions, task)
        evaluation.load_questions(task, path, plan.num_questions)


def prompt_count(plan: plans.Plan) -> int | None:
    """How many prompts will be asked, as far as the files tell."""
    if plan.listed:
        sources = load_yaml(plan.data[0], DataConfig).sources
        sizes = [source.samples or source.rows for source in sources]
        total = None if None in sizes else sum(sizes)
    else:
        total = sum(1 for path in plan.data for _ in numbered_lines(path))
    return total if plan.prompts is None else min(plan.prompts, total or plan.prompts)


def show(plan: plans.Plan, last: str | None) -> None:
    """Print every command with its estimated time, and the disk that all of it needs."""
    base = plan.out / "base"
    size, count = estimate.billions(str(base) if base.exists() else plan.model), prompt_count(plan)
    epochs = read_recipe(plan.recipe).get("num_train_epochs", 3)
    known = bool(size and count and plan.gpus)
    times = estimate.seconds(plan, size, count, epochs) if known else {}
    total = 0.0
    for stage in plans.stages_until(plan, last):
        total += times.get(stage.name, 0.0)
        about = f"  # about {estimate.spoken(times[stage.name])}" if known else ""
        print(f"[{stage.name}] {stage.command}{about}")
    if known:
        disk = estimate.gigabytes(plan, size, count)
        print(
            f"about {estimate.spoken(total)} on {plan.gpus} GPU(s) as fast as an H100, {disk:.0f} GB of disk"
        )
    else:
        print(
            "no estimate: it needs a GPU, a local model, and a data set list that says how many rows it has"
        )


def perform_all(plan: plans.Plan, last: str | None) -> bool:
    """Run the stages that are not done; whether the last of all was among them. Raises StageFailed."""
    record = plan.out / "stages.json"
    log = stages.read_log(record)
    name = None
    for stage in plans.stages_until(plan, last):
        name = stage.name
        stages.perform(
            stage,
            stages.facts_of(stage, plans.settings_of(plan, stage)),
            log,
            record,
            lambda stage: in_process(stage, plan.out / "logs" / f"{stage.name}.log"),
        )
    return name == plans.NAMES[-1]


def summarise(plan: plans.Plan) -> dict:
    """Write summary.json: losslessness, and the arm with the best mean speed-up over plain decoding.

    Prefill is excluded; means are over the benchmarks. None: not known.
    """
    means = read_json(plan.out / "evaluation" / "table.json")["average"]
    figures = {
        name: {"tau": mean["accept_length"], "speedup": mean["decode_speedup"] or mean["speedup"]}
        for name, mean in means.items()
        if name.startswith("fastmtp")
    }
    best = max(figures, key=lambda name: figures[name]["speedup"] or 0.0)
    verdicts = read_json(plan.out / "lossless" / "lossless.json")["arms"].values()
    summary = figures[best] | {
        "arm": best,
        "lossless": all(arm["verdict"] == "lossless" for arm in verdicts),
        "report": plan.path("report/report.md"),
        "arms": figures,
    }
    files.write_json(plan.out / "summary.json", summary)
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    ours, flags = split_at_dashes(argv)
    args, overrides = parser().parse_known_args(ours)
    if int(os.environ.get("NODE_RANK") or 0):
        raise InputError("NODE_RANK: the other nodes only train; run the command that --dry-run prints there")
    plan = plan_of(args, overrides, flags)
    check_questions(plan)
    if args.dry_run:
        show(plan, args.until)
        return
    if plan.gpus:
        sglang_version()
    files.claim(plan.out, folder=True)
    try:
        whole = perform_all(plan, args.until)
    except StageFailed as error:
        # Wrong tokens are a result, and the last line says so; any other error ends the run.
        if error.stage != "lossless" or not (plan.out / "lossless" / "lossless.json").exists():
            print(f"fastmtp.speedrun: error: {error}; the same command continues", file=sys.stderr)
            raise SystemExit(2 if error.code == 2 else 1) from None
        whole = True
    files.write_provenance(plan.out, vars(args) | {"recipe_flags": overrides, "engine_flags": flags})
    if whole:
        s = summarise(plan)
        line = f"tau={number(s['tau'], '.2f')} speedup={number(s['speedup'], '.2f')}"
        print(f"speedrun: {line} lossless={str(s['lossless']).lower()} report={s['report']}")
        if not s["lossless"]:
            raise SystemExit(1)


if __name__ == "__main__":
    run(main)
