"""One server asked for its speed: answers of a fixed length, at one stream or several, and a traced one."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.speed import trace
from benchmarks.speed.points import Point
from evaluation.backends import BackendError, Server, Turn
from fastmtp.budget.shapes import cycle_bytes

PROFILED_CYCLES = 40
PROFILED_TOKENS = 512  # of the traced answer: more than 0.3 s and the traced cycles take at any K


async def measure(
    url: str, point: Point, requests: int, prompt_tokens: int, tokens: int, timeout: float, streams: int = 1
) -> list[Turn]:
    """`requests` rounds of `streams` answers at once, each of exactly `tokens` tokens, after two short rounds
    as warm-up.
    """
    draw = random.Random(streams - 1)

    def prompt() -> list[int]:
        return [draw.randrange(1000, 30000) for _ in range(prompt_tokens)]

    turns: list[Turn] = []
    async with Server(url, timeout) as server:
        for number, length in enumerate([64, 64] + [tokens] * requests):
            asked = [server.ask(prompt(), length, ignore_eos=True) for _ in range(streams)]
            answers = await asyncio.gather(*asked)
            turns += answers if number >= 2 else []
    for turn in turns:
        if len(turn.output_ids) != tokens:
            raise BackendError(f"{point.name}: {len(turn.output_ids)} tokens came instead of {tokens}")
        if (turn.verify_passes is None) != (point.num_steps == 0):
            raise BackendError(
                f"{point.name}: the server {'does not draft' if point.num_steps else 'drafts'}; see its log"
            )
    return turns


async def profile(url: str, folder: Path, prompt_tokens: int, timeout: float, streams: int = 1) -> dict:
    """Trace PROFILED_CYCLES cycles of `streams` requests at once; the summary of benchmarks.speed.trace."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*.trace.json.gz"))
    async with Server(url, timeout) as server:
        # GPU activity alone: recording the host's calls too would slow the very host whose gaps are looked
        # for.
        request = {"output_dir": str(folder.resolve()), "num_steps": PROFILED_CYCLES, "activities": ["GPU"]}
        prompts = [list(range(1000 + n, 1000 + n + prompt_tokens)) for n in range(streams)]
        asked = [server.ask(prompt, PROFILED_TOKENS, ignore_eos=True) for prompt in prompts]
        answers = asyncio.gather(*asked)
        await asyncio.sleep(0.3)  # past the prefill: only whole decoding cycles are wanted
        await server.post("/start_profile", request | {"with_stack": False, "record_shapes": False})
        await answers
    end = time.monotonic() + 120
    while time.monotonic() < end:
        await asyncio.sleep(0.5)
        for path in set(folder.glob("*.trace.json.gz")) - before:
            with contextlib.suppress(EOFError, gzip.BadGzipFile, json.JSONDecodeError):  # still being written
                return trace.summarise(trace.read_events(path))
    raise BackendError(f"{folder}: no trace appeared within 120 s; see the server's log")


def row_name(point: Point, streams: int) -> str:
    return point.name if streams == 1 else f"{point.name} x{streams}"


def record(
    point: Point, turns: list[Turn], shape: dict, prompt_tokens: int, bandwidth: float, streams: int = 1
) -> dict:
    """One row: tokens/s of all streams and ms per cycle without prefill, and the share of the memory's bound.

    bandwidth: bytes/s. The bound takes the same accept length; only the time of a cycle is compared. With
    several streams a cycle is one pass of all of them.
    """
    tokens = sum(len(t.output_ids) - t.first_tokens for t in turns)
    seconds = sum(t.latency_s - t.first_s for t in turns)
    cycles = tokens if not point.num_steps else sum(t.verify_passes for t in turns)
    context = prompt_tokens + len(turns[0].output_ids) // 2
    read = cycle_bytes(shape, point.num_steps, point.head_rows, context * streams)
    speeds = [streams * (len(t.output_ids) - t.first_tokens) / (t.latency_s - t.first_s) for t in turns]
    return {
        "name": row_name(point, streams),
        "streams": streams,
        "variant": point.variant.name,
        "base": point.variant.base or point.variant.name,
        "variant_flags": list(point.variant.flags),
        "variant_environment": point.variant.environment,
        "repeat": point.repeat,
        "num_steps": point.num_steps,
        "tree": asdict(point.tree) if point.tree else None,
        "adaptive": point.adaptive,
        "map": point.map_name,
        "head_rows": point.head_rows,
        "tau_asked": point.tau,
        "tau": tokens / cycles,
        "tokens_per_s": streams * tokens / seconds,
        "spread": statistics.stdev(speeds) if len(speeds) > 1 else None,
        "ms_per_cycle": 1000 * seconds / cycles,
        "bytes_per_cycle": read,
        "bound_ms": 1000 * read / bandwidth,
        "bound_share": read / bandwidth / (seconds / cycles),
    }
