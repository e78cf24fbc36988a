"""Where a decoding cycle's time goes on the GPU, from one of SGLang's torch profiler traces.

CUDA graphs carry drafting, verification and the draft's extension. The longest graph is the verification (or
the plain decoding pass); what runs before the next one is the extension, then the drafting. Kernels outside
graphs are
filed under the graph they follow, and so is the time in which no kernel runs: there the GPU waits for the
host.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path


def read_events(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return json.load(stream)["traceEvents"]


def summarise(events: list[dict], top: int = 20) -> dict:
    """Milliseconds a cycle: `{"cycles", "span", "busy", "idle", "stages": [...], "kernels": [...]}`; GPU work
    only.

    A cycle goes from one start of the longest graph to the next; what lies outside whole cycles is left out.
    `stages`: (what, kernels per cycle, ms per cycle) in the order of a cycle; `kernels`: the `top` (stage,
    name, times per cycle, ms per cycle) by time. Raises ValueError if no graph was launched twice.
    """
    work = [
        e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and e.get("ph") == "X"
    ]
    graphs = _graphs(events, work)
    if not graphs:
        raise ValueError("the trace holds no CUDA graphs; was the server started with --disable-cuda-graph?")
    seconds = defaultdict(list)  # of each kind of graph, known by its number of kernels
    for members in graphs.values():
        seconds[len(members)].append(sum(e["dur"] for e in members))
    kind = max(seconds, key=lambda size: sum(seconds[size]) / len(seconds[size]))
    starts = sorted(min(e["ts"] for e in members) for members in graphs.values() if len(members) == kind)
    if len(starts) < 2:
        raise ValueError("the trace holds less than one whole cycle; trace more steps")
    cycles, begin, end = len(starts) - 1, starts[0], starts[-1]
    labels = _labels(graphs, kind, begin, end)
    work = sorted((e for e in work if begin <= e["ts"] < end), key=lambda e: e["ts"])
    stages: dict[str, list[float]] = {}
    names: Counter = Counter()
    times: Counter = Counter()
    stage, launch, reached = "", None, begin
    for event in work:
        correlation = event["args"].get("correlation")
        label = labels.get(correlation)
        if event["ts"] > reached:
            place = f"inside {stage}" if correlation == launch else f"after {stage}"
            _add(stages, f"idle {place}", event["ts"] - reached, 0)
        if label:
            stage, launch = label, correlation
        place = stage if label else f"outside graphs, after {stage}"
        _add(stages, place, event["dur"], 1)
        names[place, event["name"]] += event["dur"]
        times[place, event["name"]] += 1
        reached = max(reached, event["ts"] + event["dur"])
    if end > reached:
        _add(stages, f"idle after {stage}", end - reached, 0)
    per_cycle = 1000 * cycles  # microseconds of the whole trace -> milliseconds of one cycle
    idle = sum(total for name, (total, _) in stages.items() if name.startswith("idle"))
    return {
        "cycles": cycles,
        "span": (end - begin) / per_cycle,
        "busy": (end - begin - idle) / per_cycle,
        "idle": idle / per_cycle,
        "stages": [(name, count / cycles, total / per_cycle) for name, (total, count) in stages.items()],
        "kernels": [(*key, times[key] / cycles, total / per_cycle) for key, total in names.most_common(top)],
    }


def _graphs(events: list[dict], work: list[dict]) -> dict[int, list[dict]]:
    """Correlation id of a graph launch -> its kernels."""
    launches = {
        e["args"]["correlation"]
        for e in events
        if "GraphLaunch" in e.get("name", "") and "correlation" in e.get("args", {})
    }
    graphs = defaultdict(list)
    for event in work:
        if event["args"].get("correlation") in launches:
            graphs[event["args"]["correlation"]].append(event)
    return graphs


def _labels(graphs: dict[int, list[dict]], verify: int, begin: float, end: float) -> dict[int, str]:
    """Correlation id -> stage: the longest graph, then what follows it in a cycle."""
    order = sorted((min(e["ts"] for e in members), key, len(members)) for key, members in graphs.items())
    labels, place = {}, 0
    for start, key, size in order:
        if not begin <= start < end:
            continue
        place = 0 if size == verify else place + 1
        labels[key] = ("verify", "draft-extend", "draft")[place] if place < 3 else f"graph {place + 1}"
    if not any(label != "verify" for label in labels.values()):
        return dict.fromkeys(labels, "decode")
    if "draft" not in labels.values():
        # One more graph a cycle: with K = 1 nothing is drafted after the extension; without its graph (fa3 in
        # SGLang 0.5.17) the extension's kernels are outside, and the one graph is the drafting. Both read the
        # same.
        return {key: label.replace("draft-extend", "draft or draft-extend") for key, label in labels.items()}
    return labels


def _add(stages: dict[str, list[float]], name: str, microseconds: float, kernels: int) -> None:
    entry = stages.setdefault(name, [0.0, 0])
    entry[0] += microseconds
    entry[1] += kernels


def text(found: dict) -> str:
    lines = [
        f"{found['cycles']} cycles traced; a cycle {found['span']:.3f} ms, GPU busy {found['busy']:.3f} ms, "
        f"idle {found['idle']:.3f} ms (waiting for the host, and launch gaps, which tracing widens)",
        "",
    ]
    lines += [f"{ms:8.3f} ms  {count:7.1f} kernels  {label}" for label, count, ms in found["stages"]] + [""]
    lines += [
        f"{ms:8.3f} ms  {count:6.1f} x  {where}: {name[:110]}" for where, name, count, ms in found["kernels"]
    ]
    return "\n".join(lines) + "\n"
