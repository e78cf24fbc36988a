"""Where a decoding cycle's time goes on the GPU, from one of SGLang's torch profiler traces.

CUDA graphs carry the draft, the verification and the draft's extension, so kernels are grouped by the graph that
launched them: a graph is known by its number of kernels. What no kernel covers is the host's.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path


def read_events(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return json.load(stream)["traceEvents"]


def summarise(events: list[dict], cycles: int, top: int = 15) -> dict:
    """Milliseconds a cycle: `{"span", "busy", "idle", "launches": [...], "kernels": [...]}`; GPU work only.

    `launches`: (what, times a cycle, ms a cycle) for each graph and for all kernels outside graphs; `kernels`: the
    `top` kernel names by time. Raises ValueError where the trace holds no GPU work.
    """
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and e.get("ph") == "X"]
    if not work:
        raise ValueError("the trace holds no GPU kernels")
    graphs = {
        e["args"]["correlation"]
        for e in events
        if "GraphLaunch" in e.get("name", "") and "correlation" in e.get("args", {})
    }
    by_launch: dict[int, list[dict]] = defaultdict(list)
    names: Counter = Counter()
    for event in work:
        by_launch[event["args"].get("correlation", -1)].append(event)
        names[event["name"]] += event["dur"]
    groups: dict[str, list[float]] = defaultdict(list)
    for correlation, members in by_launch.items():
        label = f"graph of {len(members)} kernels" if correlation in graphs else "outside graphs"
        groups[label].append(sum(e["dur"] for e in members))
    busy = _covered([(e["ts"], e["ts"] + e["dur"]) for e in work])
    span = max(e["ts"] + e["dur"] for e in work) - min(e["ts"] for e in work)
    per_cycle = 1000 * cycles  # microseconds of the whole trace -> milliseconds of one cycle
    return {
        "span": span / per_cycle,
        "busy": busy / per_cycle,
        "idle": (span - busy) / per_cycle,
        "launches": sorted(
            ((label, len(times) / cycles, sum(times) / per_cycle) for label, times in groups.items()),
            key=lambda g: -g[2],
        ),
        "kernels": [(name, total / per_cycle) for name, total in names.most_common(top)],
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals: streams overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def text(found: dict) -> str:
    lines = [f"a cycle {found['span']:.3f} ms, GPU busy {found['busy']:.3f} ms, idle (host) {found['idle']:.3f} ms", ""]
    lines += [f"{ms:8.3f} ms  {times:7.2f} x  {label}" for label, times, ms in found["launches"]] + [""]
    lines += [f"{ms:8.3f} ms  {name[:120]}" for name, ms in found["kernels"]]
    return "\n".join(lines) + "\n"
