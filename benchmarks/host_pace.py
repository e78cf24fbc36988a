"""Whether the host keeps up with a fast card: cycles of a server that is awake and of one that slept.

    python -m benchmarks.host_pace --shape qwen2.5-1.5b --points plain,3+32k --out results/host_pace

For small models a cycle is as long as the engine's Python takes. Each point gets two servers with dummy
weights and SGLang's simulated accept length: one stays awake while it waits, as SGLang does by default, and
one sleeps (`--sleep-on-idle`). They are asked in turns, so that a host whose pace changes meets them alike.
Before and after, without servers, one Python loop is timed on each processor alone. If they differ by much, a
small model's speed-ups measured there say more about the host than about the drafts. Plain decoding hardly
depends on the host: it is the scale.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import shapes
from benchmarks.speed.measure import measure
from benchmarks.speed.points import Point, command, listed
from evaluation import metrics
from evaluation.backends import BackendError
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.engines import process, sglang
from fastmtp.engines.address import check_port
from fastmtp.engines.sglang_flags import SLEEPING
from fastmtp.files import atomic, claim, write_json, write_provenance
from fastmtp.fingerprint import gpu_name
from fastmtp.show import markdown

# Rounds of a small loop that one processor runs in 0.1 s.
LOOP = (
    "import os, sys, time\nos.sched_setaffinity(0, {int(sys.argv[1])})\nend = time.perf_counter() + 0.1\n"
    "rounds = 0\nwhile time.perf_counter() < end: rounds += sum(range(200)) > 0\nprint(rounds)"
)
STATES = ("awake", "slept")
PROMPT_TOKENS = 64
LONG = 8 * metrics.SHORT  # tokens of an answer that has enough cycles, of fewer than eight on average
SHAPE = "qwen2.5-1.5b"


def processors() -> list[int]:
    """Rounds of LOOP on each processor that this process may use, one after the other."""
    lines = []
    for cpu in sorted(os.sched_getaffinity(0)):
        line = [sys.executable, "-S", "-c", LOOP, str(cpu)]
        lines.append(int(subprocess.run(line, capture_output=True, text=True, check=True).stdout))
    return lines


def ask(servers: dict[tuple[str, str], str], points: list[Point], args) -> dict[tuple[str, str], list[dict]]:
    """{(point, state): its answers, as evaluation.metrics reads them}. `servers`: their URLs."""
    answers: dict[tuple[str, str], list[dict]] = {key: [] for key in servers}
    by_name = {point.name: point for point in points}
    for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
        for (name, state), url in servers.items():
            asked = measure(url, by_name[name], args.requests, PROMPT_TOKENS, args.tokens, args.timeout)
            answers[name, state] += [{"turns": [vars(turn)]} for turn in asyncio.run(asked)]
    return answers


def report(facts: dict, answers: dict[tuple[str, str], list[dict]], speeds: list[list[int]]) -> str:
    """The page: a row for each point and state, and how far the processors' speeds are apart."""
    rows = [
        [name, state, len(asked), markdown.around(metrics.cycle_ms(asked), ".2f")]
        for (name, state), asked in answers.items()
    ]
    rounds = [value for line in speeds for value in line]
    return "\n\n".join(
        [
            "# The host's pace",
            f"{facts['gpu']}, SGLang {facts['sglang']}, {facts['shape']}. Dummy weights, simulated accept "
            "lengths, real times.",
            markdown.grid(["point", "server", "answers", "ms per cycle, median (10 to 90 %)"], rows),
            f"The same Python loop on each of {len(speeds[0])} processors, before and after: {min(rounds):,} "
            f"to {max(rounds):,} rounds in 0.1 s, a factor of {max(rounds) / min(rounds):.1f}.",
        ]
    )


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.host_pace",
        "Milliseconds per cycle of servers that stay awake and of servers that sleep while they wait, and "
        "how fast each processor runs Python.",
        "python -m benchmarks.host_pace --shape qwen2.5-1.5b --points plain,3+32k --out results/host_pace",
    )
    p.add_argument(
        "--shape",
        default=SHAPE,
        help=f"a model folder, or one of {', '.join(shapes.SHAPES)} (default {SHAPE})",
    )
    p.add_argument(
        "--points",
        default="plain,3+32k",
        help="what to measure: plain, K or K+MAP, ... (default %(default)s)",
    )
    p.add_argument("--rounds", type=int, default=9, help="turns of each server (default %(default)s)")
    p.add_argument("--requests", type=int, default=3, help="answers in a turn (default %(default)s)")
    p.add_argument("--tokens", type=int, default=256, help="tokens per answer (default %(default)s)")
    p.add_argument("--port", type=int, default=30000, help="of the first server (default %(default)s)")
    p.add_argument("--timeout", type=float, default=300.0, help="seconds a request may take (default 300)")
    p.add_argument("--out", required=True, metavar="FOLDER")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "rounds", "requests")
    at_least(args, LONG, "tokens")
    shape, out = shapes.shape_of(args.shape), Path(args.out)
    points = listed(shape, args.points, shapes.PAPER, [], {})
    check_port(args.port, 2 * len(points))
    facts = {"sglang": sglang.sglang_version(), "gpu": gpu_name(), "shape": args.shape}
    if not torch.cuda.is_available():
        raise InputError("no GPU here; the host's pace is measured with SGLang on one")
    claim(out, folder=True)
    shapes.write_folder(shape, out / "model")
    keys = [(point, state) for point in points for state in STATES]
    servers = []
    for port, (point, state) in enumerate(keys, args.port):
        line = command(point, out / "model", port, SLEEPING if state == "slept" else [])
        log = out / "logs" / f"{point.name}-{state}.log"
        servers.append(process.Server(line, port, log, env=point.environment(), stop_patience=2.0))
    speeds = [processors()]
    try:
        with process.together(servers) as outcomes:
            for outcome in filter(None, outcomes):
                raise outcome
            urls = {(p.name, state): server.url for (p, state), server in zip(keys, servers, strict=True)}
            answers = ask(urls, points, args)
    except (BackendError, process.ServerError) as error:
        sys.exit(f"benchmarks.host_pace: error: {error}")
    speeds.append(processors())
    rows = [
        {"point": name, "server": state, "ms": metrics.cycle_times(asked)}
        for (name, state), asked in answers.items()
    ]
    write_json(out / "host_pace.json", facts | {"cycles": rows, "processors": speeds})
    text = report(facts, answers, speeds) + "\n"
    with atomic(out / "host_pace.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_provenance(out, vars(args), [])
    print(text)


if __name__ == "__main__":
    run(main)
