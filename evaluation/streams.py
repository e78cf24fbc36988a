"""Throughput with several requests at a time: `--streams 1,8,32,64`, one level after the other on one server.

A level keeps so many requests in flight until its questions are used up. Its throughput is that of the time
in which all streams were busy, so neither the start nor the end, when streams run empty, counts. A level that
was cut short is measured again as a whole: half of it says nothing of the speed.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import asdict
from pathlib import Path

from evaluation import asking, cards, metrics
from evaluation.arms import Arm
from evaluation.backends import Rejected
from evaluation.plan import REPEAT, Plan
from evaluation.questions import Task, question_keys
from fastmtp.cli import InputError
from fastmtp.engines.client import together
from fastmtp.files import write_json
from fastmtp.fingerprint import differences
from fastmtp.inputs import read_json
from fastmtp.show.markdown import grid, number
from fastmtp.tau import accept_length

PER_STREAM = 4  # questions per stream; the first and the last of each are partly outside the measured time
LEAST = 16  # questions of the smallest level


def path_of(plan: Plan, arm: Arm, level: int) -> Path:
    return plan.out / "streams" / arm.folder / f"{level}.json"


def missing(plan: Plan, arm: Arm) -> list[int]:
    """Levels of the arm that are still to be measured. InputError for one made under other settings."""
    if arm.name.startswith(REPEAT):
        return []
    levels = []
    for level in plan.streams:
        path = path_of(plan, arm, level)
        if not path.exists():
            levels.append(level)
        elif changed := differences(read_json(path).get("fingerprint") or {}, _depends(plan, arm)):
            raise InputError(f"{path}: made under other settings ({'; '.join(changed)}); give another --out")
    return levels


def _depends(plan: Plan, arm: Arm) -> dict[str, object]:
    """What a level depends on: what the arm's answers do, and which questions are asked."""
    keys = {task.name: question_keys(task, plan.questions[task.name]) for task in plan.tasks}
    return plan.fingerprint(arm) | {"questions of the streams": keys}


def _questions(plan: Plan, level: int) -> list[tuple[Task, list[str]]]:
    """First turns of a level's questions, the tasks in turn; repeated if there are too few."""
    columns = [[(task, turns[:1]) for turns in plan.questions[task.name]] for task in plan.tasks]
    pool = [item for row in itertools.zip_longest(*columns) for item in row if item]
    return list(itertools.islice(itertools.cycle(pool), max(LEAST, PER_STREAM * level)))


async def ask(backend, plan: Plan, arm: Arm) -> None:
    """Measure the missing levels and write each to its file. Raises BackendError."""
    for level in missing(plan, arm):
        prompts = {task.name: asking.Prompts(plan.tokenizers[arm.model], task) for task in plan.tasks}
        jobs = []
        for task, question in _questions(plan, level):
            key = question_keys(task, [question])[0]
            jobs.append((prompts[task.name].ids(question), plan.settings.sampling(key)))
        await _together(backend, [(ids, {}) for ids, _ in jobs[:level]], level, asking.WARM_UP_TOKENS)
        await backend.flush()
        turns = await _together(backend, jobs, level, plan.settings.max_gen_length)
        row = {
            "fingerprint": _depends(plan, arm),
            "streams": level,
            "questions": len({(task.name, *question) for task, question in _questions(plan, level)}),
            "turns": [asdict(asking.checked(turn, arm.num_steps)) for turn in turns],
        }
        write_json(path_of(plan, arm, level), row)


async def _together(backend, jobs: list[tuple[list[int], dict]], level: int, tokens: int) -> list:
    """Answers to (prompt, sampling), `level` of them in flight; questions that are refused give none."""
    free = asyncio.Semaphore(level)

    async def one(ids: list[int], sampling: dict):
        async with free:
            try:
                return await backend.ask(ids, tokens, **sampling)
            except Rejected:
                return None

    return [turn for turn in await together(one(*job) for job in jobs) if turn is not None]


def rows(plan: Plan) -> list[dict]:
    """`{"arm", "streams", "requests", "questions", "throughput", "accept_length", "speedup"}` of every arm
    and level; speed-ups are against the baseline of the arm's card at the same level.
    """
    result, plain = [], {}
    for arm, level in itertools.product(plan.arms, plan.streams):
        kept = read_json(path_of(plan, arm, level))
        answers = [{"question": str(n), "turns": [turn]} for n, turn in enumerate(kept["turns"])]
        row = {"arm": arm.name, "streams": level, "requests": len(answers), "questions": kept["questions"]}
        row["throughput"] = metrics.steady_throughput(kept["turns"], level)
        tokens, passes = metrics.output_tokens(answers), metrics.verify_passes(answers)
        row["accept_length"] = accept_length(tokens, passes)
        if not arm.num_steps:
            plain[arm.card, level] = row["throughput"]
        against = plain.get((arm.card, level))
        row["speedup"] = row["throughput"] / against if row["throughput"] and against else None
        if arm.name == cards.named(arm.name.partition("_gpu")[0], 0) or arm.num_steps:
            result.append(row)
    return result


def markdown(rows: list[dict]) -> str:
    """A table of throughput, speed-up and accept length by arm and level, and what to take from it."""
    levels = sorted({row["streams"] for row in rows})
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        text = number(row["throughput"], ",.0f")
        if row["arm"] != "baseline":
            text += f", {number(row['speedup'], '.2f')}x ({number(row['accept_length'], '.2f')})"
        cells.setdefault(row["arm"], {})[row["streams"]] = text
    head = ["arm", *(f"{level} at a time" if level > 1 else "1" for level in levels)]
    lines = [[arm, *(texts.get(level, "-") for level in levels)] for arm, texts in cells.items()]
    repeated = [row for row in rows if row["requests"] > row["questions"]]
    parts = ["Tokens per second of all streams together, speed-up over plain decoding at the same number of"]
    parts.append("streams (accept length). Only time in which every stream was busy counts.")
    if repeated:
        most = max(repeated, key=lambda row: row["requests"])
        parts.append(f"{most['requests']} requests asked {most['questions']} questions, some repeatedly.")
    return "\n\n".join([" ".join([*parts, *crossover(rows)]), grid(head, lines, 1)])


def crossover(rows: list[dict]) -> list[str]:
    """Up to how many streams the best arm is faster than plain decoding, as a sentence; [] if unknown."""
    best: dict[int, tuple[float, str]] = {}
    for row in rows:
        if row["arm"] != "baseline" and row["speedup"]:
            best[row["streams"]] = max(best.get(row["streams"], (0.0, "")), (row["speedup"], row["arm"]))
    if not best:
        return []
    pays = [level for level, (speedup, _) in best.items() if speedup > 1]
    if len(pays) == len(best):
        return [
            f"Drafting pays at every level, with {max(best)} requests at a time by {best[max(best)][0]:.2f}x."
        ]
    if not pays:
        return ["Drafting pays at no level."]
    return [f"Drafting pays with {_listed(pays)} requests at a time, not with {_listed(best.keys() - pays)}."]


def _listed(levels) -> str:
    return ", ".join(map(str, sorted(levels)))
