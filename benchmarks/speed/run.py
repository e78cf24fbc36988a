"""Speed at a shape whose weights are not available: dummy weights and SGLang's simulated accept length.

    python -m benchmarks.speed.run --shape mimo-7b --steps 1,2,3 --maps full,32k --rates paper \\
        --out results/speed_7b
    python -m benchmarks.speed.run --points plain,3+32k,3+32k@tree4x16 --streams 1,8,32 --out results/trees

Drafting, verification and the draft's extension run as they would; only how many drafts count as accepted is
drawn so that its mean is the accept length of `--rates`. So time a cycle is measured and accept length
assumed. A server is started for every point (SGLang reads the simulated length once); finished points are not
measured again. `--at-once N` starts N servers side by side and still asks one after the other; `--variant`
compares engine flags, each variant against plain decoding under the same flags. `--streams` asks each server
with so many requests at once. costs.json holds what a cycle costs, for fastmtp.plan.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import shapes
from benchmarks.gpu import copy_bandwidth
from benchmarks.speed import trace
from benchmarks.speed.measure import PROFILED_TOKENS, measure, profile, record, row_name
from benchmarks.speed.points import Point, command, listed, parse_gains, parse_variants, points, vocabulary
from benchmarks.speed.table import costs, markdown, with_speedups
from evaluation.backends import BackendError
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.engines import process, sglang
from fastmtp.engines.address import check_port
from fastmtp.engines.sglang_flags import SLEEPING, merged, split_flags
from fastmtp.files import atomic, claim, write_json, write_provenance
from fastmtp.fingerprint import differences, fingerprint, gpu_name
from fastmtp.inputs import read_jsonl, whole_numbers


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.speed.run",
        "Tokens/s, ms per cycle and speed-up at a shape with dummy weights, for K and maps. Flags after -- "
        "go to SGLang.",
        "python -m benchmarks.speed.run --shape mimo-7b --steps 1,2,3,4,5,6,7 --maps full,8k,16k,32k,64k"
        " --out results/speed_7b",
    )
    p.add_argument(
        "--shape",
        default="mimo-7b",
        help=f"a model folder, or one of {', '.join(shapes.SHAPES)} (default mimo-7b)",
    )
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
        "--points",
        metavar="LIST",
        help="just these, instead of --steps and --maps: [VARIANT.]plain, [VARIANT.]K[+MAP], with "
        "@treeTOPKxNODES or @adaptive",
    )
    p.add_argument(
        "--tree-gain",
        action="append",
        default=[],
        metavar="TOPK,DEPTH,NODES=RATIO",
        help="what this tree accepts of what its chain accepts, measured on a real head (default 1)",
    )
    p.add_argument(
        "--streams", default="1", help="requests at once, each number in turn, such as 1,8,32 (default 1)"
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
    add_asking(p)
    p.add_argument("--out", required=True, metavar="FOLDER")
    return p


def add_asking(p: Parser) -> None:
    """How the servers are started and asked."""
    p.add_argument(
        "--at-once", type=int, default=1, help="servers started side by side (default %(default)s)"
    )
    p.add_argument("--requests", type=int, default=5, help="answers at one stream (default %(default)s)")
    p.add_argument("--tokens", type=int, default=512, help="tokens per answer (default %(default)s)")
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument(
        "--profile", action="store_true", help="also trace each point and say where its cycle's time goes"
    )
    p.add_argument("--port", type=int, default=30000)
    p.add_argument("--timeout", type=float, default=300.0, help="seconds one request may take")
    p.add_argument("--wait", type=float, default=900.0, help="seconds a server may take to start")


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_flags(argv)
    args = parser().parse_args(ours)
    at_least(args, 2, "requests", "tokens", "prompt_tokens")
    at_least(args, 1, "at_once")
    check_port(args.port, args.at_once)
    shape = shapes.shape_of(args.shape)
    rates = shapes.read_rates(args.rates)
    variants, gains = parse_variants(args.variant), parse_gains(args.tree_gain)
    if args.points:
        todo = listed(shape, args.points, rates, variants, gains)
    else:
        todo = points(shape, args.steps, args.maps, rates, variants, args.repeat_baseline)
    args.streams = whole_numbers("--streams", args.streams)
    if not args.streams or min(args.streams) < 1:
        raise InputError("--streams: give numbers from 1, such as 1,8,32")
    flags = merged(load(args), flags)
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
    missing = [p for p in todo if not all(same_point(done.get(row_name(p, n)), p) for n in args.streams)]
    print(f"{out}: {len(missing)} points to measure, {len(todo) - len(missing)} kept", file=sys.stderr)
    failed = measure_all(missing, done, run_wide, args, flags, out)
    names = [row_name(point, n) for n in args.streams for point in todo if point.name not in failed]
    rows = [done[name] for name in names if name in done]
    if rows:
        report = facts | {"points": with_speedups(rows)}
        write_json(out / "speed.json", report)
        costs(rows, shape, facts).save(out / "costs.json")
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


def load(args) -> list[str]:
    """SGLang's flags for several streams: CUDA graphs for just these numbers, and room for their answers."""
    if args.streams == [1]:
        return []
    most = max(args.streams)
    room = most * (args.prompt_tokens + args.tokens + PROFILED_TOKENS)
    sizes = ["--max-running-requests", str(most), "--cuda-graph-max-bs-decode", str(most)]
    sizes += ["--cuda-graph-bs-decode", *map(str, args.streams)]
    return [*sizes, "--max-total-tokens", str(max(4096, room))]


def waiting(args) -> list[str]:
    """SGLang's flags for servers that wait while another is asked."""
    return SLEEPING if args.at_once > 1 else []


def depends(args, shape: dict, flags: list[str], version: str) -> dict:
    """What all points of a run depend on; each has settings of its own besides (`Point.settings`)."""
    settings = {name: getattr(args, name) for name in ("requests", "tokens", "prompt_tokens", "streams")}
    settings |= {"shape": shape, "flags": flags, "gpu": gpu_name(), "sglang": version}
    settings["flags of servers that wait"] = waiting(args)
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
                        for row in measure_point(server.url, point, args, bandwidth, out):
                            fixed = {"fingerprint": run_wide, "point": fingerprint({}, point.settings())}
                            done[row["name"]] = row | fixed | {"command": server.argv}
                            keep(done, out)
                    except (BackendError, process.ServerError) as error:
                        failed[point.name] = str(error)
                        tqdm.write(f"{point.name}: {error}", file=sys.stderr)
    return failed


def start(point: Point, args, port: int, flags: list[str], out: Path) -> process.Server:
    """One point's server, not started."""
    folder = out / "model"
    environment = point.environment() | (vocabulary(point, folder) if point.extended else {})
    flags = merged(waiting(args), flags)
    line, log = command(point, folder, port, flags), out / "logs" / f"{point.name}.log"
    return process.Server(line, port, log, args.wait, environment, stop_patience=2.0)


def keep(done: dict[str, dict], out: Path) -> None:
    """Write all rows to OUT/points.jsonl."""
    with atomic(out / "points.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in done.values()), encoding="utf-8")


def measure_point(url: str, point: Point, args, bandwidth: float, out: Path) -> Iterator[dict]:
    """Ask one server with each number of streams, and trace it if asked to: a row for each."""
    shape = shapes.shape_of(args.shape)
    for streams in args.streams:
        rounds = args.requests if streams == 1 else 2
        asked = measure(url, point, rounds, args.prompt_tokens, args.tokens, args.timeout, streams)
        row = record(point, asyncio.run(asked), shape, args.prompt_tokens, bandwidth, streams)
        speed = f"{row['tokens_per_s']:.1f} tok/s, {row['ms_per_cycle']:.3f} ms per cycle"
        tqdm.write(f"{row['name']}: {speed}", file=sys.stderr)
        if args.profile:
            row |= traced(url, row["name"], streams, args, row["ms_per_cycle"], out)
        yield row | {"copy_bandwidth": bandwidth}


def traced(url: str, name: str, streams: int, args, ms_per_cycle: float, out: Path) -> dict:
    """The profile of one row, also as text; nothing if there is none, because the measurement is good."""
    try:
        folder = out / "traces" / name
        summary = asyncio.run(profile(url, folder, args.prompt_tokens, args.timeout, streams))
    except (BackendError, ValueError) as error:
        tqdm.write(f"{name}: no profile: {error}", file=sys.stderr)
        return {}
    text = trace.text(summary) + f"measured without the profiler: {ms_per_cycle:.3f} ms per cycle\n"
    (out / f"profile-{name}.txt").write_text(text, encoding="utf-8")
    return {"profile": summary}


if __name__ == "__main__":
    run(main)
