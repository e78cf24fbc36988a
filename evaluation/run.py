"""Every arm on the same questions, one command: the paper's table, charts, intervals, drift.

    python -m evaluation.run --model models/NAME --vanilla-model models/BASE --arms baseline,vanilla:3,fastmtp:3 --tasks all --out results/NAME

Starts and stops an SGLang server for each arm (`--backend reference` decodes in this process instead, on the
CPU or one GPU). The baseline's first questions are asked again at the end: what changes there is drift, not
the arms. A stopped run continues with the same command; a finished question is not asked twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from evaluation import harness, metrics, table
from evaluation.backends import BackendError, Reference, Server
from evaluation.plan import Arm, Plan, add_arguments
from evaluation.questions import Task, question_keys
from fastmtp.cli import Parser, run
from fastmtp.engines import process, sglang
from fastmtp.engines.sglang import split_flags
from fastmtp.files import atomic, write_json, write_jsonl, write_provenance

PROMPT_ROOM = 8192  # tokens of a prompt that a server with a fixed key-value pool has room for
# SGLang has no float32 kernel of its plain RMSNorm and none of FlashAttention 3; deterministic inference
# replaces the
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
        "--repeat-questions",
        type=int,
        default=10,
        help="baseline questions asked again to show drift; 0: none",
    )
    return p


def ask_all(plan: Plan, repeat_questions: int) -> tuple[list[tuple[Arm, Task, list[dict]]], dict[str, dict]]:
    """Answers of every arm and task, and each arm's environment. Raises BackendError or ServerError."""
    jobs = plan.jobs(repeat_questions)
    missing = [
        (arm, limit) for arm, limit in jobs if not (plan.note(arm).exists() and _complete(plan, arm, limit))
    ]
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
            await harness.collect(
                backend, tokenizer, task, questions, settings, path, arm.num_steps, a.parallel
            )
    return harness.environment(info, a.backend)


@contextlib.contextmanager
def _servers(plan: Plan, arms: list[Arm]) -> Iterator[list[str | None]]:
    """URLs of servers, one for each arm, that started side by side; None with the reference backend.

    Raises ServerError where one does not come up.
    """
    if plan.args.backend == "reference":
        yield [None] * len(arms)
        return
    sglang.sglang_version()
    print(f"{', '.join(arm.name for arm in arms)}: starting", file=sys.stderr, flush=True)
    servers = [
        process.Server(
            _command(plan, arm, plan.args.port + n),
            plan.args.port + n,
            plan.out / "logs" / f"{arm.folder}.log",
            env=FLOAT32_ENVIRONMENT if plan.dtype == "float32" else None,
        )
        for n, arm in enumerate(arms)
    ]
    with process.together(servers) as outcomes:
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
    flags = sglang.without(defaults, plan.flags) + plan.flags
    return sglang.command(arm.model, arm.num_steps, arm.token_map, 1, port, flags)


def result_lines(
    plan: Plan, found: list[tuple[Arm, Task, list[dict]]], environments: dict[str, dict]
) -> list[dict]:
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


def ask_or_exit(
    plan: Plan, repeat_questions: int
) -> tuple[list[tuple[Arm, Task, list[dict]]], dict[str, dict]]:
    """`ask_all`; a backend that fails ends the command with exit code 1 and says that nothing is lost."""
    try:
        return ask_all(plan, repeat_questions)
    except (BackendError, process.ServerError) as error:
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
        print(
            f"no matplotlib here; draw the pictures elsewhere: python -m evaluation.charts {out}",
            file=sys.stderr,
        )
        return
    from evaluation import charts

    charts.draw_folder(out)


if __name__ == "__main__":
    run(main)
