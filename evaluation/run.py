"""Every arm on the same questions, one command: the paper's table, charts, intervals, drift.

    python -m evaluation.run --model models/NAME --vanilla-model models/BASE --arms baseline,vanilla:3,fastmtp:3 --tasks all --out results/NAME

Starts and stops an SGLang server for each arm (`--backend reference` decodes in this process instead, on the CPU or
one GPU). The baseline's first questions are asked again at the end: what changes there is drift, not the arms.
A stopped run continues with the same command; a finished question is not asked twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from evaluation import harness, metrics, table
from evaluation.arms import REPEAT, Arm, parse_arms
from evaluation.client import Server
from evaluation.harness import Settings
from evaluation.questions import Task, load_questions, question_keys
from evaluation.reference import Reference
from evaluation.tasks import parse_tasks, question_file
from evaluation.turn import BackendError
from fastmtp import serve
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.files import atomic, existing, write_json, write_jsonl, write_provenance

PROMPT_ROOM = 8192  # tokens of a prompt that a server with a fixed key-value pool has room for
# SGLang has no float32 kernel of its plain RMSNorm and none of FlashAttention 3; deterministic inference replaces the
# first. Triton multiplies float32 in TensorFloat-32, 10 bits, unless told otherwise.
FLOAT32_FLAGS = ["--enable-deterministic-inference", "--attention-backend", "triton"]
FLOAT32_ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee"}


def parser() -> Parser:
    p = Parser(
        "python -m evaluation.run",
        "Accept length, speed and losslessness of every arm on every task. Flags after -- go to SGLang.",
        "python -m evaluation.run --model models/smollm2-fastmtp --arms baseline,fastmtp:1,fastmtp:2,fastmtp:3 --tasks all"
        " --out results/smollm2",
    )
    add_arguments(p)
    p.add_argument(
        "--repeat-questions", type=int, default=10, help="baseline questions asked again to show drift; 0: none"
    )
    return p


def add_arguments(p: Parser) -> None:
    """What `run` and `lossless` share."""
    p.add_argument("--model", required=True, metavar="FOLDER", help="exported model with the trained head")
    p.add_argument("--vanilla-model", metavar="FOLDER", help="the same model with the head before training")
    p.add_argument(
        "--arms", default="baseline,fastmtp:3", help="baseline, vanilla:K, fastmtp:K, +MAP (default %(default)s)"
    )
    p.add_argument(
        "--token-map", action="append", default=[], metavar="NAME=PATH", help="names a map for the arms; repeatable"
    )
    p.add_argument("--tasks", default="all", help="all, or names separated by commas (default %(default)s)")
    p.add_argument("--question-folder", metavar="FOLDER", help="local TASK*.jsonl files instead of the Hub")
    p.add_argument("--num-questions", type=int, default=80, help="of each task (default %(default)s)")
    p.add_argument("--max-gen-length", type=int, default=1024, help="tokens an answer may have (default %(default)s)")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=0, help="of sampling, where the temperature is above 0")
    p.add_argument("--parallel", type=int, default=1, help="requests in flight; speed-ups are defined at 1")
    p.add_argument("--at-once", type=int, default=1, help="servers started side by side, asked one after the other")
    p.add_argument("--backend", choices=("sglang", "reference"), default="sglang")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default bfloat16 on sglang, float32 on reference")
    p.add_argument("--device", default="cpu", help="of the reference backend (default %(default)s)")
    p.add_argument("--port", type=int, default=30000)
    p.add_argument("--timeout", type=float, default=600.0, help="seconds one request may take")
    p.add_argument("--out", required=True, metavar="FOLDER", help="answers, results.jsonl, table.md, charts")


def split_flags(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """Our arguments and, after `--`, SGLang's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], serve.renamed(argv[cut + 1 :])


class Plan:
    """What is to be asked: checked arguments, arms, tasks and their questions. Raises InputError for bad input."""

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
                serve.command(arm.model, arm.num_steps, arm.token_map, backend="triton")

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


def ask_all(plan: Plan, repeat_questions: int) -> tuple[list[tuple[Arm, Task, list[dict]]], dict[str, dict]]:
    """Answers of every arm and task, and each arm's environment. Raises BackendError or ServerError."""
    jobs = plan.jobs(repeat_questions)
    missing = [(arm, limit) for arm, limit in jobs if not (plan.note(arm).exists() and _complete(plan, arm, limit))]
    for first in range(0, len(missing), plan.args.at_once):
        group = missing[first : first + plan.args.at_once]
        with _servers(plan, [arm for arm, _ in group]) as urls:
            for (arm, limit), url in zip(group, urls, strict=True):
                write_json(plan.note(arm), asyncio.run(_ask_arm(plan, arm, limit, url)))
    found, environments = [], {}
    for arm, limit in jobs:
        environments[arm.name] = json.loads(plan.note(arm).read_text())
        for task in plan.tasks:
            done = harness.read_answers(plan.answer_file(arm, task), plan.settings(arm, task))
            keys = question_keys(task, plan.questions[task.name][:limit])
            found.append((arm, task, [done[key] for key in dict.fromkeys(keys)]))
    return found, environments


def _complete(plan: Plan, arm: Arm, limit: int) -> bool:
    """Whether every answer is there, so that no server need start."""
    for task in plan.tasks:
        done = harness.read_answers(plan.answer_file(arm, task), plan.settings(arm, task))
        if not done.keys() >= set(question_keys(task, plan.questions[task.name][:limit])):
            return False
    return True


async def _ask_arm(plan: Plan, arm: Arm, limit: int, url: str | None) -> dict:
    """Ask one arm everything that is missing; its environment."""
    a = plan.args
    if url is None:
        backend = Reference(arm.model, plan.dtype, a.device, arm.num_steps, arm.token_map)
    else:
        backend = Server(url, a.timeout)
    tokenizer = harness.load_tokenizer(arm.model)
    async with backend:
        info = await backend.info()
        for task in plan.tasks:
            questions, settings = plan.questions[task.name][:limit], plan.settings(arm, task)
            path = plan.answer_file(arm, task)
            await harness.collect(backend, tokenizer, task, questions, settings, path, arm.num_steps, a.parallel)
    return harness.environment(info, a.backend)


@contextlib.contextmanager
def _servers(plan: Plan, arms: list[Arm]) -> Iterator[list[str | None]]:
    """URLs of servers, one for each arm, that started side by side; None with the reference backend.

    Raises ServerError where one does not come up.
    """
    if plan.args.backend == "reference":
        yield [None] * len(arms)
        return
    serve.sglang_version()
    print(f"{', '.join(arm.name for arm in arms)}: starting", file=sys.stderr, flush=True)
    servers = [
        serve.Server(
            _command(plan, arm, plan.args.port + n),
            plan.args.port + n,
            plan.out / "logs" / f"{arm.folder}.log",
            env=FLOAT32_ENVIRONMENT if plan.dtype == "float32" else None,
        )
        for n, arm in enumerate(arms)
    ]
    with serve.together(servers) as outcomes:
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        yield [server.url for server in servers]


def _command(plan: Plan, arm: Arm, port: int) -> list[str]:
    """SGLang's command line for one arm."""
    streams = str(plan.args.parallel)
    defaults = ["--dtype", plan.dtype, "--mem-fraction-static", "0.7"]
    if plan.args.at_once > 1:
        # Shares of free memory mean nothing while others are taking theirs: a fixed key-value pool for each.
        tokens = plan.args.parallel * (plan.args.max_gen_length + PROMPT_ROOM)
        defaults[-1:] = ["0.95", "--max-total-tokens", str(tokens)]
    defaults += ["--max-running-requests", streams, "--cuda-graph-max-bs-decode", streams]
    defaults += ["--disable-prefill-cuda-graph", "--skip-server-warmup", "--grammar-backend", "none"]
    if plan.dtype == "float32":
        defaults += FLOAT32_FLAGS
    flags = serve.without(defaults, plan.flags) + plan.flags
    return serve.command(arm.model, arm.num_steps, arm.token_map, 1, port, flags)


def result_lines(plan: Plan, found: list[tuple[Arm, Task, list[dict]]], environments: dict[str, dict]) -> list[dict]:
    """One contract line for each arm and task, against the baseline's answers to the same questions."""
    plain = {task.name: rows for arm, task, rows in found if arm.name == "baseline"}
    lines = []
    for arm, task, rows in found:
        asked = {row["question"] for row in rows}
        baseline = [row for row in plain.get(task.name, []) if row["question"] in asked] or None
        settings = plan.settings(arm, task)
        config = harness.bench_config(task, plan.files[task.name], settings, plan.args.parallel)
        line = metrics.result_line(
            rows,
            task=task.name,
            arm=arm.name,
            model=arm.model,
            num_steps=arm.num_steps,
            token_map=arm.token_map,
            temperature=plan.args.temperature,
            config=config | {"dtype": plan.dtype},
            environment=environments[arm.name],
            baseline=None if arm.name == "baseline" else baseline,
        )
        if arm.name == "baseline":
            line["speedup"] = 1.0
        lines.append(line)
    return lines


def ask_or_exit(plan: Plan, repeat_questions: int) -> tuple[list[tuple[Arm, Task, list[dict]]], dict[str, dict]]:
    """`ask_all`; a backend that fails ends the command with exit code 1 and says that nothing is lost."""
    try:
        return ask_all(plan, repeat_questions)
    except (BackendError, serve.ServerError) as error:
        sys.exit(
            f"evaluation: error: {error}\nevaluation: finished answers are kept in {plan.out}; the same command continues"
        )


def main(argv: list[str] | None = None) -> None:
    ours, sglang_flags = split_flags(argv)
    args = parser().parse_args(ours)
    plan = Plan(args, sglang_flags)
    found, environments = ask_or_exit(plan, args.repeat_questions)
    lines = result_lines(plan, found, environments)
    write_jsonl(plan.out / "results.jsonl", lines)
    answers = {(arm.name, task.name): rows for arm, task, rows in found}
    report = table.build(lines, answers, {task.name: task.title for task in plan.tasks})
    write_json(plan.out / "table.json", report)
    text = table.markdown(report)
    with atomic(plan.out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    config = vars(args) | {"dtype": plan.dtype, "sglang_flags": sglang_flags}
    write_provenance(plan.out, config, [path for path in plan.files.values() if path])
    print(text)
    draw_charts(plan.out)


def draw_charts(out: Path) -> None:
    """Last, and not at all on a machine without matplotlib: the figures are what cannot be had again."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no matplotlib here; draw the pictures elsewhere: python -m evaluation.charts {out}", file=sys.stderr)
        return
    from evaluation import charts

    charts.draw_folder(out)


if __name__ == "__main__":
    run(main)
