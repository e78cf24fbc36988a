"""Speed at a shape whose weights are not available: dummy weights, SGLang's simulated accept length, one
stream.

    python -m benchmarks.speed.run --shape mimo-7b --steps 1,2,3 --maps full,32k --rates paper \\
        --out results/speed_7b

Drafting, verification and the draft's extension run as they would; only how many drafts count as accepted is
drawn so that its mean is the accept length of `--rates`. So time a cycle is measured and accept length
assumed. A server is started for every point (SGLang reads the simulated length once); finished points are not
measured again. `--at-once N` starts N servers side by side and still asks one after the other; `--variant`
compares engine flags, each variant against plain decoding under the same flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import shapes
from benchmarks.gpu import copy_bandwidth
from benchmarks.speed import trace
from benchmarks.speed.points import Point, command, parse_variants, points, vocabulary
from benchmarks.speed.table import markdown, with_speedups
from evaluation.backends import BackendError, Server, Turn
from fastmtp.budget.shapes import cycle_bytes
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.engines import process, sglang
from fastmtp.engines.address import check_port
from fastmtp.engines.sglang_flags import split_flags
from fastmtp.files import atomic, claim, write_json, write_provenance
from fastmtp.fingerprint import differences, fingerprint, gpu_name
from fastmtp.inputs import read_jsonl

PROFILED_CYCLES = 40
PROFILED_TOKENS = 512  # of the traced answer: more than 0.3 s and the traced cycles take at any K


async def measure(
    url: str, point: Point, requests: int, prompt_tokens: int, tokens: int, timeout: float
) -> list[Turn]:
    """`requests` answers of exactly `tokens` tokens, one after the other, after two short ones as warm-up."""
    draw = random.Random(0)
    async with Server(url, timeout) as server:
        for _ in range(2):
            await server.ask([draw.randrange(1000, 30000) for _ in range(prompt_tokens)], 64, ignore_eos=True)
        turns = []
        for _ in range(requests):
            prompt = [draw.randrange(1000, 30000) for _ in range(prompt_tokens)]
            turns.append(await server.ask(prompt, tokens, ignore_eos=True))
    for turn in turns:
        if len(turn.output_ids) != tokens:
            raise BackendError(f"{point.name}: {len(turn.output_ids)} tokens came instead of {tokens}")
        if (turn.verify_passes is None) != (point.num_steps == 0):
            raise BackendError(
                f"{point.name}: the server {'does not draft' if point.num_steps else 'drafts'}; see its log"
            )
    return turns


async def profile(url: str, folder: Path, prompt_tokens: int, timeout: float) -> dict:
    """Trace PROFILED_CYCLES cycles of one request; the summary of benchmarks.speed.trace."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*.trace.json.gz"))
    async with Server(url, timeout) as server:
        # GPU activity alone: recording the host's calls too would slow the very host whose gaps are looked
        # for.
        request = {"output_dir": str(folder.resolve()), "num_steps": PROFILED_CYCLES, "activities": ["GPU"]}
        prompt = list(range(1000, 1000 + prompt_tokens))
        answer = asyncio.ensure_future(server.ask(prompt, PROFILED_TOKENS, ignore_eos=True))
        await asyncio.sleep(0.3)  # past the prefill: only whole decoding cycles are wanted
        await server.post("/start_profile", request | {"with_stack": False, "record_shapes": False})
        await answer
    end = time.monotonic() + 120
    while time.monotonic() < end:
        await asyncio.sleep(0.5)
        for path in set(folder.glob("*.trace.json.gz")) - before:
            with contextlib.suppress(EOFError, gzip.BadGzipFile, json.JSONDecodeError):  # still being written
                return trace.summarise(trace.read_events(path))
    raise BackendError(f"{folder}: no trace appeared within 120 s; see the server's log")


def record(point: Point, turns: list[Turn], shape: dict, prompt_tokens: int, bandwidth: float) -> dict:
    """One measured point: tokens/s and ms per cycle without prefill, and the share of the bandwidth bound.

    bandwidth: bytes/s. The bound takes the same accept length; only the time of a cycle is compared.
    """
    tokens = sum(len(t.output_ids) - t.first_tokens for t in turns)
    seconds = sum(t.latency_s - t.first_s for t in turns)
    cycles = tokens if not point.num_steps else sum(t.verify_passes for t in turns)
    context = prompt_tokens + len(turns[0].output_ids) // 2
    read = cycle_bytes(shape, point.num_steps, point.head_rows, context)
    speeds = [(len(t.output_ids) - t.first_tokens) / (t.latency_s - t.first_s) for t in turns]
    return {
        "name": point.name,
        "variant": point.variant.name,
        "base": point.variant.base or point.variant.name,
        "variant_flags": list(point.variant.flags),
        "repeat": point.repeat,
        "num_steps": point.num_steps,
        "map": point.map_name,
        "head_rows": point.head_rows,
        "tau_asked": point.tau,
        "tau": tokens / cycles,
        "tokens_per_s": tokens / seconds,
        "spread": statistics.stdev(speeds) if len(speeds) > 1 else None,
        "ms_per_cycle": 1000 * seconds / cycles,
        "bytes_per_cycle": read,
        "bound_ms": 1000 * read / bandwidth,
        "bound_share": read / bandwidth / (seconds / cycles),
    }


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.speed.run",
        "Tokens/s, ms per cycle and speed-up at a shape with dummy weights, for K and maps. Flags after -- "
        "go to SGLang.",
        "python -m benchmarks.speed.run --shape mimo-7b --steps 1,2,3,4,5,6,7 --maps full,8k,16k,32k,64k"
        " --out results/speed_7b",
    )
    p.add_argument("--shape", choices=sorted(shapes.SHAPES), default="mimo-7b")
    p.add_argument("--steps", default="1,2,3,4,5,6,7", help="draft steps K (default %(default)s)")
    p.add_argument(
        "--maps",
        default="full,8k,16k,32k,64k",
        help="draft vocabulary sizes, as 32k or, to find their rates in FILE, as its arms name them: en32k",
    )
    p.add_argument(
        "--rates",
        default="paper",
        metavar="paper|FILE",
        help="acceptance by position: the paper's or a results.jsonl",
    )
    p.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME[:BASE]=FLAGS",
        help="measure under these SGLang flags, VARIABLE=VALUE before them, against BASE's plain decoding or "
        "their own",
    )
    p.add_argument(
        "--repeat-baseline", action="store_true", help="plain decoding once more at the end: drift"
    )
    p.add_argument(
        "--at-once", type=int, default=1, help="servers started side by side (default %(default)s)"
    )
    p.add_argument("--requests", type=int, default=5, help="answers per point (default %(default)s)")
    p.add_argument("--tokens", type=int, default=512, help="tokens per answer (default %(default)s)")
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument(
        "--profile", action="store_true", help="also trace each point and say where its cycle's time goes"
    )
    p.add_argument("--port", type=int, default=30000)
    p.add_argument("--timeout", type=float, default=300.0, help="seconds one request may take")
    p.add_argument("--wait", type=float, default=900.0, help="seconds a server may take to start")
    p.add_argument("--out", required=True, metavar="FOLDER")
    return p


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_flags(argv)
    args = parser().parse_args(ours)
    at_least(args, 2, "requests", "tokens", "prompt_tokens")
    at_least(args, 1, "at_once")
    check_port(args.port, args.at_once)
    shape = shapes.SHAPES[args.shape]
    rates = shapes.read_rates(args.rates)
    todo = points(shape, args.steps, args.maps, rates, parse_variants(args.variant), args.repeat_baseline)
    version = sglang.sglang_version()
    if not torch.cuda.is_available():
        raise InputError("no GPU here; the speed model measures SGLang on one")
    out = Path(args.out)
    claim(out, folder=True)
    shapes.write_folder(shape, out / "model")
    for n, point in enumerate(todo):  # an impossible flag must not surface after an hour
        command(point, out / "model", args.port + n % args.at_once, flags)
    facts = {"gpu": gpu_name(), "sglang": version, "rates": args.rates, "shape": args.shape}
    facts["assumed"] = sorted({p.map_name for p in todo if p.map_name} - rates.by_map.keys())
    run_wide = depends(args, shape, flags, version)
    done = kept(out / "points.jsonl", run_wide)
    missing = [p for p in todo if not same_point(done.get(p.name), p)]
    print(f"{out}: {len(missing)} points to measure, {len(todo) - len(missing)} kept", file=sys.stderr)
    failed = measure_all(missing, done, run_wide, args, flags, out)
    rows = [done[point.name] for point in todo if point.name in done and point.name not in failed]
    if rows:
        report = facts | {"points": with_speedups(rows)}
        write_json(out / "speed.json", report)
        table = markdown(report)
        with atomic(out / "speed.md") as temporary:
            temporary.write_text(table, encoding="utf-8")
    write_provenance(out, vars(args) | {"sglang_flags": flags}, [] if args.rates == "paper" else [args.rates])
    if rows:
        print(table)
        draw_chart(report, out)
    if failed:
        sys.exit(
            f"benchmarks.speed.run: error: not measured: {', '.join(failed)}\n{failed[next(iter(failed))]}\n"
            f"measured points are kept in {out}; the same command tries the others again"
        )


def draw_chart(report: dict, out: Path) -> None:
    """Last, and not at all on a machine without matplotlib: the figures are what cannot be had again."""
    if importlib.util.find_spec("matplotlib") is None:
        elsewhere = f"python -m benchmarks.speed.chart {out}"
        print(f"no matplotlib here; draw the picture elsewhere: {elsewhere}", file=sys.stderr)
        return
    from benchmarks.speed.chart import draw

    draw(report, out / "speed.png")


def depends(args, shape: dict, flags: list[str], version: str) -> dict:
    """What all points of a run depend on; each has settings of its own besides (`Point.settings`)."""
    settings = {name: getattr(args, name) for name in ("requests", "tokens", "prompt_tokens")}
    settings |= {"shape": shape, "flags": flags, "gpu": gpu_name(), "sglang": version}
    settings["environment"] = {k: v for k, v in sorted(os.environ.items()) if k.startswith("SGLANG_")}
    return fingerprint({}, settings)


def kept(store: Path, run_wide: dict) -> dict[str, dict]:
    """Rows measured before, by name. InputError if they were measured under anything else."""
    done = {row["name"]: row for _, row in read_jsonl(store)} if store.exists() else {}
    for name, row in done.items():
        if changed := differences(row.get("fingerprint") or {}, run_wide):
            raise InputError(
                f"{store}: {name} was measured with other settings ({'; '.join(changed)}); name another --out"
            )
    return done


def same_point(row: dict | None, point: Point) -> bool:
    """Whether `row` is a measurement of just this point."""
    return row is not None and not differences(row["point"], fingerprint({}, point.settings()))


def measure_all(
    missing: list[Point], done: dict[str, dict], run_wide: dict, args, flags: list[str], out: Path
) -> dict[str, str]:
    """Add the missing points to `done`, kept in OUT/points.jsonl; errors of those that failed, by name.

    `--at-once` servers start together, each is asked alone.
    """
    failed = {}
    bandwidth = copy_bandwidth() if missing else 0.0
    with tqdm(total=len(missing), desc="points", disable=None) as bar:
        for first in range(0, len(missing), args.at_once):
            group = missing[first : first + args.at_once]
            servers = [start(point, args, args.port + n, flags, out) for n, point in enumerate(group)]
            with process.together(servers) as outcomes:
                for point, server, outcome in zip(group, servers, outcomes, strict=True):
                    bar.update()
                    try:
                        if outcome is not None:
                            raise outcome
                        row = measure_point(server.url, point, args, bandwidth, out)
                    except (BackendError, process.ServerError) as error:
                        failed[point.name] = str(error)
                        tqdm.write(f"{point.name}: {error}", file=sys.stderr)
                        continue
                    done[point.name] = row | {
                        "fingerprint": run_wide,
                        "point": fingerprint({}, point.settings()),
                        "command": server.argv,
                    }
                    with atomic(out / "points.jsonl") as temporary:
                        lines = "".join(json.dumps(r) + "\n" for r in done.values())
                        temporary.write_text(lines, encoding="utf-8")
                    speed = f"{row['tokens_per_s']:.1f} tok/s, {row['ms_per_cycle']:.3f} ms per cycle"
                    tqdm.write(f"{point.name}: {speed}", file=sys.stderr)
    return failed


def start(point: Point, args, port: int, flags: list[str], out: Path) -> process.Server:
    """One point's server, not started."""
    folder = out / "model"
    environment = point.environment() | (vocabulary(point, folder) if point.extended else {})
    line, log = command(point, folder, port, flags), out / "logs" / f"{point.name}.log"
    return process.Server(line, port, log, args.wait, environment, stop_patience=2.0)


def measure_point(url: str, point: Point, args, bandwidth: float, out: Path) -> dict:
    """Ask one server, and trace it if asked to."""
    shape = shapes.SHAPES[args.shape]
    turns = asyncio.run(measure(url, point, args.requests, args.prompt_tokens, args.tokens, args.timeout))
    row = record(point, turns, shape, args.prompt_tokens, bandwidth) | {"copy_bandwidth": bandwidth}
    if args.profile:
        try:
            found = asyncio.run(profile(url, out / "traces" / point.name, args.prompt_tokens, args.timeout))
        except (BackendError, ValueError) as error:  # the measurement itself is good
            tqdm.write(f"{point.name}: no profile: {error}", file=sys.stderr)
            return row
        row["profile"] = found
        text = trace.text(found) + f"measured without the profiler: {row['ms_per_cycle']:.3f} ms per cycle\n"
        (out / f"profile-{point.name}.txt").write_text(text, encoding="utf-8")
    return row


if __name__ == "__main__":
    run(main)
