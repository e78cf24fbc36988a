"""Every arm on the same questions, one command: the paper's table, charts, intervals, drift.

    python -m evaluation.run --model models/NAME --vanilla-model models/BASE --tasks all --out results/NAME \\
        --arms baseline,vanilla:3,fastmtp:3

Starts and stops a server for each arm, SGLang's or vLLM's; with --gpus N on N cards at once. --streams 1,8,32
also measures throughput with so many requests at a time. `--backend reference` decodes in this process
instead, on the CPU or one GPU. The baseline's first questions are asked again at the end: what changes there
is drift, not the arms. A stopped run continues with the same command; a finished question is not asked twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from evaluation import asking, cards, conditions, metrics, page, streams, table
from evaluation.answers import Answers
from evaluation.arguments import add_arguments
from evaluation.arms import Arm
from evaluation.backend_vllm import VllmServer
from evaluation.backends import BackendError, Reference, Rejected, Server
from evaluation.plan import REPEAT, Plan
from evaluation.questions import Task, question_keys
from fastmtp.cli import Parser, at_least, run, split_at_dashes
from fastmtp.engines import process, sglang
from fastmtp.files import atomic, write_json, write_jsonl, write_provenance
from fastmtp.inputs import read_json

OUTPUTS = ("results.jsonl", "table.json", "table.md", "streams.jsonl")
OUTPUTS += ("radar.png", "steps.png", "acceptance.png", "streams.png")
Result = tuple[Arm, Task, list[dict]]  # an arm's answers to a task


def parser() -> Parser:
    p = Parser(
        "python -m evaluation.run",
        "Accept length, speed and losslessness of every arm on every task. Flags after -- go to the engine.",
        "python -m evaluation.run --model models/smollm2-fastmtp --arms baseline,fastmtp:1,fastmtp:3"
        " --tasks all --out results/smollm2",
    )
    add_arguments(p)
    p.add_argument(
        "--streams",
        default="",
        metavar="N,N,...",
        help="also measure throughput with so many requests at a time, such as 1,8,32,64",
    )
    p.add_argument(
        "--repeat-questions",
        type=int,
        default=10,
        help="baseline questions asked again to show drift; 0: none",
    )
    return p


def ask_all(plan: Plan, repeat_questions: int) -> tuple[list[Result], dict[str, dict]]:
    """Answers of every arm and task, and each arm's environment. Raises BackendError or ServerError."""
    jobs = plan.jobs(repeat_questions)
    results, environments = [], {}
    with plan.answers(jobs) as kept:
        missing = [(arm, limit) for arm, limit in jobs if not _complete(plan, kept, arm, limit)]
        for group in _groups(plan, missing):
            with _servers(plan, [arm for arm, _ in group]) as urls:
                asyncio.run(_ask_group(plan, kept, group, urls))
        for arm, limit in jobs:
            environments[arm.name] = read_json(plan.note(arm))
            for task in plan.tasks:
                results.append((arm, task, kept[arm.name, task.name].to(_keys(plan, task, limit))))
    asked = sum(answers.asked for answers in kept.values())
    print(
        f"evaluation: {conditions.counts(asked, sum(len(rows) for _, _, rows in results))}", file=sys.stderr
    )
    return results, environments


def _keys(plan: Plan, task: Task, limit: int) -> list[str]:
    return question_keys(task, plan.questions[task.name][:limit])


def _complete(plan: Plan, kept: dict[tuple[str, str], Answers], arm: Arm, limit: int) -> bool:
    """Whether every answer is there, so that no server need start."""
    return (
        plan.note(arm).exists()
        and not streams.missing(plan, arm)
        and all(kept[arm.name, task.name].rows.keys() >= set(_keys(plan, task, limit)) for task in plan.tasks)
    )


def _groups(plan: Plan, jobs: list[tuple[Arm, int]]) -> list[list[tuple[Arm, int]]]:
    """Jobs whose servers run side by side: one per card, or --at-once of them on the one card. The reference
    backend holds one model at a time.
    """
    if plan.cards:
        return cards.rounds(jobs, len(plan.cards))
    size = 1 if plan.args.backend == "reference" else plan.args.at_once
    return [jobs[first : first + size] for first in range(0, len(jobs), size)]


async def _ask_group(plan: Plan, kept: dict, group: list[tuple[Arm, int]], urls: list[str | None]) -> None:
    """Ask a group's arms: at the same time if each has a card of its own. Arms that share a card take turns,
    question by question, so that a host or card whose pace changes meets them all alike; the baseline's
    repetition comes after them.
    """
    turn = asking.NOTHING if plan.cards else asyncio.Lock()

    async def one(arm: Arm, limit: int, url: str | None) -> None:
        try:
            write_json(plan.note(arm), await _ask_arm(plan, kept, arm, limit, url, turn))
        except BackendError as error:
            if len(group) > 1:
                print(f"evaluation: {arm.name}: {error}; the other arms go on", file=sys.stderr, flush=True)
            raise

    jobs = [(arm, limit, url) for (arm, limit), url in zip(group, urls, strict=True)]
    last = [] if plan.cards else [job for job in jobs if job[0].name == REPEAT]
    for together in ([job for job in jobs if job not in last], last):
        # An arm that fails must not take what the others still answer.
        outcomes = await asyncio.gather(*(one(*job) for job in together), return_exceptions=True)
        for error in filter(None, outcomes):
            raise error


async def _ask_arm(
    plan: Plan,
    kept: dict,
    arm: Arm,
    limit: int,
    url: str | None,
    turn: contextlib.AbstractAsyncContextManager,
) -> dict:
    """Ask one arm everything that is missing; its environment. `turn` is held while it uses the card."""
    a = plan.args
    if url is None:
        backend = Reference(arm.model, plan.dtype, a.device, arm.tree or arm.num_steps, arm.token_map)
    elif plan.engine:
        backend = VllmServer(url, a.timeout, alone=plan.most == 1)
    else:
        backend = Server(url, a.timeout)
    async with backend:
        info = await backend.info()
        refused = None
        for task in plan.tasks:
            prompts = asking.Prompts(plan.tokenizers[arm.model], task)
            questions, answers = plan.questions[task.name][:limit], kept[arm.name, task.name]
            try:
                await asking.collect(
                    backend,
                    prompts,
                    questions,
                    plan.settings,
                    answers,
                    arm.num_steps,
                    a.parallel,
                    arm.name,
                    turn,
                )
            except Rejected as error:  # the other tasks' questions are asked all the same
                refused = refused or error
        if refused:
            raise refused
        async with turn:
            await streams.ask(backend, plan, arm)
    card = {"card": arm.card} if plan.cards else {}
    return conditions.environment(info, a.backend) | card


@contextlib.contextmanager
def _servers(plan: Plan, arms: list[Arm]) -> Iterator[list[str | None]]:
    """URLs of servers, one for each arm, that started side by side; None with the reference backend.

    Raises ServerError if one does not come up.
    """
    if plan.args.backend == "reference":
        yield [None] * len(arms)
        return
    if not plan.engine:
        sglang.sglang_version()
    print(f"{', '.join(arm.name for arm in arms)}: starting", file=sys.stderr, flush=True)
    servers = []
    for port, arm in enumerate(arms, plan.args.port):
        log = plan.out / "logs" / f"{arm.folder}.log"
        servers.append(process.Server(plan.command(arm, port), port, log, env=plan.environment(arm)))
    with process.together(servers) as outcomes:
        for arm, server, outcome in zip(arms, servers, outcomes, strict=True):
            if outcome is not None:
                raise outcome
            server.require(plan.ready(arm))
        yield [server.url for server in servers]


def result_lines(plan: Plan, results: list[Result], environments: dict[str, dict]) -> list[dict]:
    """One contract line for each arm and task, against its card's baseline on the same questions."""
    baselines = {arm.name for arm in plan.arms if not arm.num_steps}
    plain = {(arm.card, task.name): rows for arm, task, rows in results if arm.name in baselines}
    depends = {arm.name: plan.fingerprint(arm) for arm, _, _ in results}
    lines = []
    for arm, task, rows in results:
        asked = {row["question"] for row in rows}
        baseline = [row for row in plain.get((arm.card, task.name), []) if row["question"] in asked] or None
        config = conditions.bench_config(
            task,
            plan.files[task.name],
            plan.questions[task.name],
            plan.settings,
            plan.args.parallel,
            depends[arm.name],
        )
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
            baseline=None if arm.name in baselines else baseline,
        )
        if arm.name in baselines and line["throughput"]:
            line["speedup"] = 1.0
        lines.append(line)
    return lines


def ask_or_exit(
    plan: Plan, repeat_questions: int, outputs: tuple[str, ...]
) -> tuple[list[Result], dict[str, dict]]:
    """`ask_all`; a backend that fails ends the command with exit code 1 and says that nothing is lost.

    outputs: names of the files that the command will write into the folder.
    """
    plan.claim(*outputs)
    try:
        return ask_all(plan, repeat_questions)
    except (BackendError, process.ServerError) as error:
        sys.exit(
            f"evaluation: error: {error}\n"
            f"evaluation: finished answers are kept in {plan.out}; the same command continues"
        )


def finish(plan: Plan) -> None:
    """Write the record of a command that ended."""
    config = vars(plan.args) | {"dtype": plan.dtype, "engine_flags": plan.flags}
    write_provenance(plan.out, config, [path for path in plan.files.values() if path])


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_at_dashes(argv)
    args = parser().parse_args(ours)
    at_least(args, 0, "repeat_questions")
    plan = Plan(args, flags)
    results, environments = ask_or_exit(plan, args.repeat_questions, OUTPUTS)
    lines = result_lines(plan, results, environments)
    write_jsonl(plan.out / "results.jsonl", lines)
    answers = {(arm.name, task.name): rows for arm, task, rows in results}
    levels = streams.rows(plan)
    if levels:
        write_jsonl(plan.out / "streams.jsonl", levels)
    report = table.build(lines, answers, {task.name: task.title for task in plan.tasks}, levels)
    write_json(plan.out / "table.json", report)
    text = page.markdown(report)
    with atomic(plan.out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    finish(plan)
    print(text)
    draw_charts(plan.out)
    finish(plan)  # the pictures are this command's, too


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
