"""The paper's Table 1 for any model: speed-up and accept length by arm and task, with intervals and plain
warnings.

`build` makes the JSON from contract lines and answers; `markdown` and charts.py only show it.
"""

from __future__ import annotations

from evaluation import metrics
from evaluation.plan import REPEAT
from fastmtp.show.markdown import grid, number

DRIFT_LIMIT = 0.03  # a baseline that changed by more makes speed-ups of that size meaningless
FEW = 20  # questions below which an interval says little


def build(lines: list[dict], answers: dict[tuple[str, str], list[dict]], titles: dict[str, str]) -> dict:
    """`{"tasks", "titles", "arms", "cells": {arm: {task: {...}}}, "average": {arm: {...}}, "drift",
    "warnings"}`.
    """
    arms = [name for name in dict.fromkeys(line["arm"] for line in lines) if name != REPEAT]
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    cells: dict[str, dict[str, dict]] = {name: {} for name in arms}
    for line in lines:
        if line["arm"] != REPEAT:
            cells[line["arm"]][line["task"]] = _cell(line, answers)
    average = {
        name: {
            key: _mean(cell[key] for cell in cells[name].values())
            for key in ("speedup", "accept_length", "throughput")
        }
        for name in arms
    }
    pooled = {
        name: metrics.position_rates(
            [a for task in tasks for a in answers[name, task]], cells[name][tasks[0]]["num_steps"]
        )
        for name in arms
    }
    drift = {line["task"]: line["speedup"] - 1 for line in lines if line["arm"] == REPEAT and line["speedup"]}
    report = {"tasks": tasks, "titles": titles, "arms": arms, "cells": cells, "average": average}
    report |= {"position_rates": pooled, "drift": drift}
    return report | {"environment": lines[0]["environment"], "warnings": warnings(lines, drift)}


def _cell(line: dict, answers: dict[tuple[str, str], list[dict]]) -> dict:
    rows = answers[line["arm"], line["task"]]
    plain = None if line["arm"] == "baseline" else answers.get(("baseline", line["task"]))
    shown = (
        "num_questions",
        "num_steps",
        "output_tokens",
        "throughput",
        "decode_throughput",
        "accept_length",
        "speedup",
    )
    return {key: line[key] for key in (*shown, "position_rates", "lossless")} | {
        "intervals": metrics.intervals(rows, plain)
    }


def _mean(values) -> float | None:
    """None if one of the values is unknown: a mean of the others would not be that of all tasks."""
    values = list(values)
    return None if None in values else sum(values) / len(values)


def warnings(lines: list[dict], drift: dict[str, float]) -> list[str]:
    """Reasons not to believe a number, each a sentence."""
    reasons = []
    for task, change in drift.items():
        if abs(change) > DRIFT_LIMIT:
            reasons.append(
                f"{task}: the baseline's tokens/s changed by {change:+.1%} from start to end; speeds drifted."
            )
    if not any(line["arm"] == "baseline" for line in lines):
        reasons.append("No baseline in this run: no speed-ups and no losslessness.")
    elif not drift:
        reasons.append("The baseline was not repeated: drift is unknown.")
    config = lines[0]["config"]
    if config["parallel"] > 1:
        reasons.append(
            f"{config['parallel']} requests in flight: speed-ups are not the single-stream ones of the paper."
        )
    few = min(line["num_questions"] for line in lines if line["arm"] != REPEAT)
    if few < FEW:
        reasons.append(f"Only {few} questions in at least one task: read the intervals, not the averages.")
    for line in lines:
        place = f"{line['arm']} on {line['task']}"
        reasons += [f"{place}: {reason}." for reason in metrics.unknowns(line)]
        lossless = line["lossless"]
        if not lossless or lossless["share"] in (None, 1.0):
            continue
        text = f"{place}: {lossless['identical']} of {lossless['questions']} outputs equal the baseline's"
        if config.get("dtype") == "float32":
            reasons.append(f"NOT LOSSLESS in float32: {text}. See python -m evaluation.lossless.")
        else:
            reasons.append(f"{text}; python -m evaluation.lossless tells rounding from wrong tokens.")
    return reasons


def markdown(report: dict) -> str:
    titles = report["titles"]
    environment = report["environment"]
    place = environment["gpu"] or "CPU"
    versions = environment["versions"]
    engines = {"sglang": ("SGLang", "sglang"), "vllm": ("vLLM", "vllm")}
    name, package = engines.get(environment["backend"], ("torch", "torch"))
    engine = f"{name} {versions.get(package)}"
    head = ["arm", *(titles[name] for name in report["tasks"]), "average"]
    rows = []
    for name in report["arms"]:
        cells = [_short(report["cells"][name][task]) for task in report["tasks"]]
        rows.append([name, *cells, _short(report["average"][name])])
    detail_head = [
        "arm",
        "task",
        "questions",
        "accept length (95 %)",
        "tok/s (95 %)",
        "decode tok/s",
        "speed-up (95 %)",
    ]
    detail_head += ["identical", "accepted at position 1, 2, ..."]
    details = [
        _detail(name, titles[task], report["cells"][name][task])
        for name in report["arms"]
        for task in report["tasks"]
    ]
    parts = [
        "# Speed and accept length",
        f"{place}, {engine}, {environment['settings'].get('dtype')}, {environment['finished']}. "
        "Speed-up (accept length); baseline in tokens/s, end to end. Averages are means over tasks.",
        grid(head, rows),
    ]
    if report["warnings"]:
        parts += ["**Be careful:**", "\n".join(f"- {text}" for text in report["warnings"])]
    parts += [" ".join(f"![{text}]({name})" for name, text in pictures(report).items())]
    parts += ["## Detail", grid(detail_head, details)]
    if report["drift"]:
        changes = ", ".join(f"{titles[task]} {change:+.1%}" for task, change in report["drift"].items())
        parts.append(f"Baseline asked again at the end, change in tokens/s: {changes}.")
    return "\n\n".join(filter(None, parts)) + "\n"


def pictures(report: dict) -> dict[str, str]:
    """Names of the pictures that this table has something to show in, and what they show."""
    arms = [name for name in report["arms"] if name != "baseline"]
    names = {"radar.png": "speed-up by task"} if arms and _all_speedups(report, arms) else {}
    both = {"steps.png": "accept length and speed by draft steps", "acceptance.png": "acceptance by position"}
    return names | (both if arms else {})


def _all_speedups(report: dict, arms: list[str]) -> bool:
    return all(report["average"][name]["speedup"] for name in arms)


def _short(cell: dict) -> str:
    plain = cell["accept_length"] is None or cell["accept_length"] == 1.0
    if cell["speedup"] is None or (plain and cell["speedup"] == 1.0):
        return f"{number(cell['throughput'], '.1f')} tok/s" + (
            "" if plain else f" ({cell['accept_length']:.2f})"
        )
    return f"{cell['speedup']:.2f}x ({number(cell['accept_length'], '.2f')})"


def _detail(name: str, title: str, cell: dict) -> list[str]:
    spans = cell["intervals"]
    lossless = cell["lossless"]
    return [
        name,
        title,
        str(cell["num_questions"]),
        _spanned(cell["accept_length"], spans.get("accept_length"), ".2f") if cell["num_steps"] else "1",
        _spanned(cell["throughput"], spans.get("throughput"), ".1f"),
        number(cell["decode_throughput"], ".1f"),
        _spanned(cell["speedup"], spans.get("speedup"), ".2f"),
        f"{lossless['identical']}/{lossless['questions']}" if lossless else "",
        _rates(cell["position_rates"]),
    ]


def _rates(rates: list[float] | None) -> str:
    return "-" if rates is None else " ".join(f"{rate:.2f}" for rate in rates)


def _spanned(value: float | None, span: list[float] | None, form: str) -> str:
    if value is None or span is None:
        return number(value, form)
    return f"{value:{form}} ({span[0]:{form}} to {span[1]:{form}})"
