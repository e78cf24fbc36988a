"""What an evaluation asks: arms, tasks and their questions, checked before a server starts.

Arms: `baseline`, `vanilla:K`, `fastmtp:K`, each speculative one with `+MAP` for a draft vocabulary. K is the
number of draft steps. `vanilla` is the head as it was before training and lives in a model folder of its own;
`baseline` is the same model without drafts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation import harness
from evaluation.c_eval.bench_sglang_eagle import TASK as C_EVAL
from evaluation.cnn_dm.bench_sglang_eagle import TASK as CNN_DM
from evaluation.harness import Settings
from evaluation.livecodebench.bench_sglang_eagle import TASK as LIVECODEBENCH
from evaluation.math_500.bench_sglang_eagle import TASK as MATH_500
from evaluation.mt_bench.bench_sglang_eagle import TASK as MT_BENCH
from evaluation.nq_qa.bench_sglang_eagle import TASK as NQ_QA
from evaluation.nq_rag.bench_sglang_eagle import TASK as NQ_RAG
from evaluation.questions import Task, load_questions
from fastmtp.cli import InputError, Parser, at_least
from fastmtp.engines import sglang
from fastmtp.files import existing, resource

REPEAT = "baseline_repeat"


@dataclass(frozen=True)
class Arm:
    """num_steps 0: plain decoding. token_map: a path, or None for the full head."""

    name: str
    model: str
    num_steps: int
    token_map: str | None
    map_name: str | None = None

    @property
    def folder(self) -> str:
        """The name as a folder name."""
        return self.name.replace(":", "-")


def parse_arms(names: str, model: str, vanilla_model: str | None, token_maps: list[str]) -> list[Arm]:
    """`--arms` and `--token-map NAME=PATH ...` -> arms, baseline first. Raises InputError for what cannot be
    run.
    """
    maps = dict(_named(item) for item in token_maps)
    arms = [_arm(name.strip(), model, vanilla_model, maps) for name in names.split(",") if name.strip()]
    if not arms:
        raise InputError("--arms: empty; for example --arms baseline,fastmtp:3")
    doubled = {a.name for a in arms if sum(b.name == a.name for b in arms) > 1}
    if doubled:
        raise InputError(f"--arms: {', '.join(sorted(doubled))} is named twice; name each arm once")
    return sorted(arms, key=lambda arm: arm.num_steps > 0)  # stable: only the baseline moves


def _named(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if not equals or not name or not path:
        raise InputError(f"--token-map {item}: expected NAME=PATH, for example en32k=vocab/smollm2/en_32k.pt")
    return name, str(existing(resource(path), "token map"))


def _arm(name: str, model: str, vanilla_model: str | None, maps: dict[str, str]) -> Arm:
    if name == "baseline":
        return Arm(name, model, 0, None)
    match = re.fullmatch(r"(vanilla|fastmtp):([1-9]\d?)(?:\+(\w[\w.-]*))?", name)
    if not match:
        raise InputError(
            f"--arms: '{name}' is not baseline, vanilla:K or fastmtp:K, with +MAP for a token map"
        )
    kind, steps, map_name = match.groups()
    if map_name and map_name not in maps:
        raise InputError(f"--arms: '{name}' needs --token-map {map_name}=PATH")
    if kind == "vanilla" and not vanilla_model:
        raise InputError(f"--arms: '{name}' needs --vanilla-model, the folder with the head before training")
    folder = vanilla_model if kind == "vanilla" else model
    return Arm(name, folder, int(steps), maps.get(map_name) if map_name else None, map_name)


TASKS = {t.name: t for t in (MT_BENCH, LIVECODEBENCH, MATH_500, NQ_QA, NQ_RAG, CNN_DM, C_EVAL)}


def parse_tasks(names: str) -> list[Task]:
    """`all` or a comma-separated list."""
    if names == "all":
        return list(TASKS.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        raise InputError(
            f"--tasks: '{', '.join(unknown) or names}' is not a task; choose all or {', '.join(TASKS)}"
        )
    return [TASKS[name] for name in dict.fromkeys(wanted)]


def question_file(folder: str | None, task: Task) -> Path | None:
    """FOLDER/TASK.jsonl, or the one file whose name begins with the task's; None without a folder (then the
    Hub).
    """
    if folder is None:
        return None
    exact = existing(folder, "folder") / f"{task.name}.jsonl"
    found = [exact] if exact.exists() else sorted(Path(folder).glob(f"{task.name}*.jsonl"))
    if len(found) != 1:
        raise InputError(
            f"{folder}: {len(found) or 'no'} files named {task.name}*.jsonl; expected one, or leave the task out"
        )
    return found[0]


def add_arguments(p: Parser) -> None:
    """What `run` and `lossless` share."""
    p.add_argument("--model", required=True, metavar="FOLDER", help="exported model with the trained head")
    p.add_argument("--vanilla-model", metavar="FOLDER", help="the same model with the head before training")
    p.add_argument(
        "--arms",
        default="baseline,fastmtp:3",
        help="baseline, vanilla:K, fastmtp:K, +MAP (default %(default)s)",
    )
    p.add_argument(
        "--token-map",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="names a map for the arms; repeatable",
    )
    p.add_argument("--tasks", default="all", help="all, or names separated by commas (default %(default)s)")
    p.add_argument("--question-folder", metavar="FOLDER", help="local TASK*.jsonl files instead of the Hub")
    p.add_argument("--num-questions", type=int, default=80, help="of each task (default %(default)s)")
    p.add_argument(
        "--max-gen-length", type=int, default=1024, help="tokens an answer may have (default %(default)s)"
    )
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=0, help="of sampling, where the temperature is above 0")
    p.add_argument("--parallel", type=int, default=1, help="requests in flight; speed-ups are defined at 1")
    p.add_argument(
        "--at-once", type=int, default=1, help="servers started side by side, asked one after the other"
    )
    p.add_argument("--backend", choices=("sglang", "reference"), default="sglang")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default bfloat16 on sglang, float32 on reference"
    )
    p.add_argument("--device", default="cpu", help="of the reference backend (default %(default)s)")
    p.add_argument("--port", type=int, default=30000)
    p.add_argument("--timeout", type=float, default=600.0, help="seconds one request may take")
    p.add_argument("--out", required=True, metavar="FOLDER", help="answers, results.jsonl, table.md, charts")


class Plan:
    """What is to be asked: checked arguments, arms, tasks and their questions. Raises InputError for bad
    input.
    """

    def __init__(self, args, sglang_flags: list[str]):
        harness.check_counts(args)
        at_least(args, 1, "at_once")
        existing(args.model, "model folder")
        self.args, self.flags, self.out = args, sglang_flags, Path(args.out)
        if args.vanilla_model:
            existing(args.vanilla_model, "vanilla model folder")
        self.arms = parse_arms(args.arms, args.model, args.vanilla_model, args.token_map)
        self.tasks = parse_tasks(args.tasks)
        self.dtype = args.dtype or ("float32" if args.backend == "reference" else "bfloat16")
        if args.backend == "reference" and args.parallel > 1:
            raise InputError("--parallel: the reference backend answers one request at a time; leave it out")
        self.files = {task.name: question_file(args.question_folder, task) for task in self.tasks}
        self.questions = {
            task.name: load_questions(task, self.files[task.name], args.num_questions) for task in self.tasks
        }
        if args.backend == "sglang":
            for arm in self.arms:  # a wrong folder should not be found out after an hour
                sglang.command(arm.model, arm.num_steps, arm.token_map, backend="triton")

    def settings(self, arm: Arm, task: Task) -> Settings:
        a = self.args
        return Settings(task.name, arm.name, arm.model, a.temperature, a.max_gen_length, a.seed, self.dtype)

    def note(self, arm: Arm) -> Path:
        """Where the arm's answers come from: engine, versions."""
        return self.out / "environments" / f"{arm.folder}.json"

    def answer_file(self, arm: Arm, task: Task) -> Path:
        return self.out / "answers" / arm.folder / f"{task.name}.jsonl"

    def jobs(self, repeat_questions: int) -> list[tuple[Arm, int]]:
        """(arm, number of questions a task); the baseline's first questions once more at the end."""
        jobs = [(arm, self.args.num_questions) for arm in self.arms]
        if repeat_questions and self.arms[0].num_steps == 0:
            jobs.append((replace(self.arms[0], name=REPEAT), repeat_questions))
        return jobs
