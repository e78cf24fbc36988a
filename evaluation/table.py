"""The paper's Table 1 for any model: speed-up and accept length by arm and task, with intervals and plain
warnings.

`build` makes the JSON from contract lines and answers; page.py and charts.py only show it.
"""

from __future__ import annotations

from pathlib import Path

from evaluation import cards, metrics
from evaluation.plan import REPEAT
from fastmtp.engines.sglang_flags import SLEEPING

DRIFT_LIMIT = 0.03  # a baseline that changed by more makes speed-ups of that size meaningless
PACE_LIMIT = 1.5  # 90th over 10th percentile of an arm's milliseconds per cycle
MEANS = ("speedup", "decode_speedup", "accept_length", "throughput", "decode_throughput")
FEW = 20  # questions below which an interval says little


def build(
    lines: list[dict],
    answers: dict[tuple[str, str], list[dict]],
    titles: dict[str, str],
    streams: list[dict] | None = None,
) -> dict:
    """`{"tasks", "titles", "arms", "cells": {arm: {task: {...}}}, "average": {arm: {...}}, "position_rates",
    "cycle_ms", "drift", "cards", "streams", "facts", "environment", "warnings"}`.

    Baselines of other cards than the first, and baselines that were repeated, are no rows of the table.
    """
    repeats = [line for line in lines if line["arm"].startswith(REPEAT)]
    plain = [line for line in lines if line not in repeats and not line["num_steps"]]
    shown = [line for line in lines if line["num_steps"] or line["arm"] == "baseline"]
    arms = list(dict.fromkeys(line["arm"] for line in shown))
    tasks = list(dict.fromkeys(line["task"] for line in shown))
    cells: dict[str, dict[str, dict]] = {name: {} for name in arms}
    average = {}
    for name in arms:
        draws = []
        for line in (line for line in shown if line["arm"] == name):
            cells[name][line["task"]], drawn = _cell(line, answers, lines)
            draws.append(drawn)
        average[name] = {key: _mean(cell[key] for cell in cells[name].values()) for key in MEANS}
        average[name]["intervals"] = metrics.intervals(metrics.mean_draws(draws))
    pooled = {
        name: metrics.position_rates(
            [a for task in tasks for a in answers[name, task]], cells[name][tasks[0]]["num_steps"]
        )
        for name in arms
    }
    drift: dict[str, float] = {}
    for line in repeats:  # of several cards the one that drifted most
        if line["speedup"] and abs(line["speedup"] - 1) >= abs(drift.get(line["task"], 0)):
            drift[line["task"]] = line["speedup"] - 1
    cycles = {name: metrics.cycle_ms([a for task in tasks for a in answers[name, task]]) for name in arms}
    report = {"tasks": tasks, "titles": titles, "arms": arms, "cells": cells, "average": average}
    report |= {
        "position_rates": pooled,
        "cycle_ms": cycles,
        "drift": drift,
        "cards": _cards(plain),
        "streams": streams or [],
    }
    environment = lines[0]["environment"] | {"dtype": lines[0]["config"].get("dtype")}
    report |= {"facts": facts(lines[0]), "environment": environment}
    return report | {"warnings": [*unsteady(lines, cycles), *warnings(lines, drift)]}


def _cell(line: dict, answers: dict[tuple[str, str], list[dict]], lines: list[dict]) -> tuple[dict, dict]:
    """An arm's figures of a task, and the bootstrap draws that its intervals come from."""
    rows, plain = answers[line["arm"], line["task"]], None
    baseline = cards.named("baseline", line["environment"].get("card", 0))
    if line["num_steps"]:
        plain = answers.get((baseline, line["task"]))
    keys = ("num_questions", "num_steps", "output_tokens", "throughput", "decode_throughput", "accept_length")
    cell = {key: line[key] for key in (*keys, "speedup", "position_rates", "lossless")}
    cell["first_ms"] = metrics.first_ms(rows)
    draws = metrics.draws(rows, plain)
    before = metrics.decode_throughput(plain) if plain else None
    now = line["decode_throughput"]
    cell["decode_speedup"] = now / before if now and before else 1.0 if line["arm"] == "baseline" else None
    return cell | {"intervals": metrics.intervals(draws)}, draws


def _cards(plain: list[dict]) -> dict[str, float]:
    """Card -> mean over tasks of its baseline's tokens per second; {} if there was one card."""
    rates: dict[str, list[float]] = {}
    for line in plain:
        if line["throughput"] and "card" in line["environment"]:
            rates.setdefault(str(line["environment"]["card"]), []).append(line["throughput"])
    means = {card: sum(values) / len(values) for card, values in rates.items()}
    return means if len(means) > 1 else {}


def facts(line: dict) -> list[str]:
    """What was real, what simulated, and how tokens were chosen, each a sentence."""
    depends, model = line["config"]["fingerprint"], Path(line["model"]).name
    simulated = []
    if depends.get("--load-format") == "dummy":
        simulated.append("the weights (random)")
    if depends.get("SGLANG_SIMULATE_ACC_LEN"):
        length = depends["SGLANG_SIMULATE_ACC_LEN"]
        simulated.append(f"the accept length (SGLANG_SIMULATE_ACC_LEN={length}), and so the text")
    if simulated:
        said = [f"Simulated: {'; '.join(simulated)}. Real: the times, measured by the client."]
    else:
        said = [
            f"Real: the weights of {model}, the questions, every answer, and every time, measured by the "
            "client. Simulated: nothing."
        ]
    if line["temperature"]:
        used = [f"temperature {line['temperature']:g}"]
        used += [f"top-k {depends['top_k']}"] if depends.get("top_k") else []
        used += [f"top-p {depends['top_p']:g}"] if depends.get("top_p", 1.0) < 1 else []
        said.append(
            f"Sampled at {', '.join(used)}: same distribution, not the same text, so no texts are compared."
        )
    return said


def _mean(values) -> float | None:
    """None if one of the values is unknown: a mean of the others would not be that of all tasks."""
    values = list(values)
    return None if None in values else sum(values) / len(values)


def unsteady(lines: list[dict], cycles: dict[str, list[float] | None]) -> list[str]:
    """A sentence on the arm whose cycles differ most in length over the answers, if by over PACE_LIMIT.

    Requests in flight together, and steps that change, make cycles differ by themselves.
    """
    if lines[0]["config"].get("parallel", 1) > 1:
        return []
    spread = {
        n: ms[2] / ms[0] for n, ms in cycles.items() if ms and ms[0] > 0 and not n.endswith("@adaptive")
    }
    worst = max(spread, key=spread.__getitem__, default=None)
    if worst is None or spread[worst] <= PACE_LIMIT:
        return []
    low, _, high = cycles[worst]
    return [
        f"{worst}: a cycle took {low:.1f} to {high:.1f} ms (10th to 90th percentile of the answers). If the "
        "texts' lengths do not explain it, arms that were not asked in turns (--at-once) cannot be compared. "
        "A host that is slow at times also delays the first token (below)."
    ]


def warnings(lines: list[dict], drift: dict[str, float]) -> list[str]:
    """Reasons not to believe a number, each a sentence."""
    reasons = []
    moved = {task: change for task, change in drift.items() if abs(change) > DRIFT_LIMIT}
    if moved:
        worst = max(moved, key=lambda task: abs(moved[task]))
        reasons.append(
            f"The baseline's tokens/s changed from start to end on {len(moved)} of {len(drift)} tasks, most "
            f"on {worst} ({moved[worst]:+.1%}): speeds drifted."
        )
    if not any(line["arm"] == "baseline" for line in lines):
        reasons.append("No baseline in this run: no speed-ups and no losslessness.")
    elif not drift:
        reasons.append("The baseline was not repeated: drift is unknown.")
    config = lines[0]["config"]
    if config["fingerprint"].keys() >= set(SLEEPING):
        reasons.append(
            "The servers slept while they waited (--sleep-on-idle, which --at-once adds), after which a "
            "small model may draft more slowly: compare the arms with each other, but take speed-ups over "
            "plain decoding from a run without --at-once."
        )
    if config.get("parallel", 1) > 1:
        reasons.append(
            f"{config['parallel']} requests in flight: speed-ups are not the single-stream ones of the paper."
        )
    few = min(line["num_questions"] for line in lines if not line["arm"].startswith(REPEAT))
    if few < FEW:
        reasons.append(f"Only {few} questions in at least one task: read the intervals, not the averages.")
    for line in lines:
        place = f"{line['arm']} on {line['task']}"
        reasons += [f"{place}: {reason}." for reason in metrics.unknowns(line)]
    return reasons + _other_texts(lines, config.get("dtype") == "float32")


def _other_texts(lines: list[dict], exact: bool) -> list[str]:
    """Sentences on answers that are not the baseline's: a fault if arithmetic is `exact`, by arm and task;
    otherwise one for all arms, as rounding alone has this effect.
    """
    compared = [(line["arm"], line["task"], line["lossless"]) for line in lines if line["lossless"]]
    compared = [(arm, task, counts) for arm, task, counts in compared if counts["questions"]]
    if exact:
        return [
            f"NOT LOSSLESS in float32: {arm} on {task}: {counts['identical']} of {counts['questions']} "
            "outputs equal the baseline's. See python -m evaluation.lossless."
            for arm, task, counts in compared
            if counts["share"] < 1.0
        ]
    sums: dict[str, list[int]] = {}
    for arm, _, counts in compared:
        same, asked = sums.get(arm, (0, 0))
        sums[arm] = [same + counts["identical"], asked + counts["questions"]]
    said = [f"{arm} {same} of {asked}" for arm, (same, asked) in sums.items() if same < asked]
    if not said:
        return []
    return [
        f"Outputs equal to the baseline's: {', '.join(said)}; python -m evaluation.lossless tells rounding "
        "from wrong tokens."
    ]
