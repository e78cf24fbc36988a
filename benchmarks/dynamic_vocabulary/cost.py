"""What a draft vocabulary that follows the language costs and brings at a 7B shape: cycles measured, accept
lengths given.

    python -m benchmarks.dynamic_vocabulary.cost --sizes 16k,32k --unions 30301,52926 \\
        --out results/vocab_cost \\
        --taus 16k=taus_16k.json,32k=taus_32k.json

First, without a server: the time of a switch, and of the draft's output head inside a CUDA graph that a
switch must reach. Then SGLang with dummy weights: the whole head, static maps (SGLang's own), and the
following vocabulary, asked in one language and in two in turn. `--taus` (python -m fastmtp.acceptance
--token-maps ... --out FILE) adds what
counts: tokens per second of each choice for each language.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import shapes
from benchmarks.dynamic_vocabulary.cost_table import markdown, read_taus, speeds
from benchmarks.dynamic_vocabulary.kernels import LANGS, kernels, toy_vocab
from evaluation.backends import BackendError, Server, Turn
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.engines import process, sglang
from fastmtp.engines.address import check_port
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang_flags import DUMMY, MEASURED, SLEEPING, merged, split_flags, streams
from fastmtp.files import atomic, claim, write_json, write_provenance
from fastmtp.fingerprint import differences, fingerprint, gpu_name
from fastmtp.inputs import read_json
from fastmtp.vocab.token_map import parse_size, size_name

FLAGS = [*DUMMY, *SLEEPING, *MEASURED, *streams(1)]


@dataclass(frozen=True)
class Arm:
    """kind: full, stock (SGLang's own static map) or auto (ours); rows: ids of the map."""

    kind: str
    rows: int

    @property
    def name(self) -> str:
        return "full" if self.kind == "full" else f"{self.kind} {size_name(self.rows)}"


def start(
    arm: Arm, folder: Path, port: int, tau: float, steps: int, flags: list[str], shape: dict
) -> process.Server:
    """The server of one arm, not started; its map's file is made beside the model folder."""
    token_map, env = None, {}
    if arm.kind == "stock":
        token_map = folder / f"map_{arm.rows}.pt"
        with atomic(token_map) as temporary:
            torch.save(torch.arange(arm.rows), temporary)
    elif arm.kind == "auto":
        path = folder / f"vocab_{arm.rows}.pt"
        toy_vocab(arm.rows, shape["vocab_size"]).save(path)
        env = sglang.extension(path)
    env |= {"SGLANG_SIMULATE_ACC_LEN": f"{tau:.4f}", "SGLANG_SIMULATE_ACC_METHOD": "match-expected"}
    env |= {"SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token"}
    flags = merged(FLAGS, flags)
    serving = Serving(str(folder), steps, token_map and str(token_map), port=port, flags=flags)
    line = sglang.command(serving)
    return process.Server(line, port, folder.parent / "logs" / f"{arm.name.replace(' ', '_')}.log", env=env)


async def stream(url: str, arm: Arm, langs: list[str], tokens: int) -> list[Turn]:
    """One request after the other, each with a prompt of its language's ids."""
    draw = random.Random(0)
    turns = []
    async with Server(url, 300) as server:
        for lang in langs:
            low = LANGS.index(lang) * arm.rows if arm.kind == "auto" else 1000
            prompt = [draw.randrange(low, low + min(arm.rows, 8192)) for _ in range(64)]
            turns.append(await server.ask(prompt, tokens, ignore_eos=True))
    return turns


def record(name: str, turns: list[Turn]) -> dict:
    """ms per cycle without prefill, tokens/s of whole requests, and their spread."""
    tokens = sum(len(t.output_ids) - t.first_tokens for t in turns)
    seconds = sum(t.latency_s - t.first_s for t in turns)
    cycles = sum(t.verify_passes for t in turns)
    rates = [len(t.output_ids) / t.latency_s for t in turns]
    return {
        "name": name,
        "requests": len(turns),
        "tau": tokens / cycles,
        "ms_per_cycle": 1000 * seconds / cycles,
        "tokens_per_s": sum(len(t.output_ids) for t in turns) / sum(t.latency_s for t in turns),
        "spread": statistics.stdev(rates) if len(rates) > 1 else 0.0,
    }


async def measure(url: str, arm: Arm, requests: int, tokens: int) -> list[dict]:
    """The arm's rows: one language, and for `auto` two in turn as well, in blocks that alternate."""
    await stream(url, arm, list(LANGS), 64)
    one, two = ["en"] * requests, [LANGS[i % 2] for i in range(requests)]
    if arm.kind != "auto":
        return [record(arm.name, await stream(url, arm, one * 2, tokens))]
    same, both = [], []
    for _ in range(2):
        same += await stream(url, arm, one, tokens)
        both += await stream(url, arm, two, tokens)
    return [record(arm.name, same), record(f"{arm.name}, languages in turn", both)]


def switches_in(log: Path) -> int | None:
    """The last number of switches that the server wrote down."""
    lines = [
        line
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if " switches;" in line
    ]
    return int(lines[-1].partition(" switches;")[0].split()[-1]) if lines else None


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.dynamic_vocabulary.cost",
        "Time of a switch, cycles of following and static draft vocabularies at 7B shape. Flags after -- "
        "go to SGLang.",
        "python -m benchmarks.dynamic_vocabulary.cost --sizes 16k,32k --unions 30301,52926 --at-once 4 "
        "--out results/vocab_cost",
    )
    p.add_argument("--shape", choices=sorted(shapes.SHAPES), default="mimo-7b")
    p.add_argument("--sizes", default="16k,32k", help="rows of one language's map (default %(default)s)")
    p.add_argument(
        "--unions",
        default="30301,52926",
        help="rows of the languages' maps together, for each size (default: Qwen2's en and zh)",
    )
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle (default %(default)s)")
    p.add_argument("--tau", type=float, default=2.4, help="accept length to simulate (default %(default)s)")
    p.add_argument(
        "--taus",
        metavar="16k=FILE,32k=FILE",
        help="accept lengths from fastmtp.acceptance, one file per size",
    )
    p.add_argument("--kernels", action="store_true", help="no servers: only the switch and the head")
    p.add_argument("--requests", type=int, default=8, help="answers per block (default %(default)s)")
    p.add_argument("--tokens", type=int, default=256, help="tokens per answer (default %(default)s)")
    p.add_argument(
        "--at-once", type=int, default=1, help="servers started side by side (default %(default)s)"
    )
    p.add_argument("--port", type=int, default=30400)
    p.add_argument("--out", required=True, metavar="FOLDER")
    return p


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_flags(argv)
    args = parser().parse_args(ours)
    at_least(args, 1, "num_steps", "requests", "tokens", "at_once")
    check_port(args.port, args.at_once)
    shape = shapes.SHAPES[args.shape]
    sizes, unions = ([parse_size(text) for text in texts.split(",")] for texts in (args.sizes, args.unions))
    if len(sizes) != len(unions) or 2 * max(sizes + unions) > shape["vocab_size"]:
        raise InputError(
            f"--sizes {args.sizes} --unions {args.unions}: one union for each size, two maps within "
            f"{shape['vocab_size']} ids"
        )
    tau_files = dict(part.partition("=")[::2] for part in args.taus.split(",")) if args.taus else {}
    taus = {parse_size(text): read_taus(path) for text, path in tau_files.items()}
    out = Path(args.out)
    claim(out, folder=True)
    shapes.write_folder(shape, out / "model")
    arms = [] if args.kernels else arms_of(shape, sizes, unions)
    done = kept(out / "measured.json", depends(args, shape, flags))
    missing = [arm for arm in arms if arm.name not in done["arms"]]
    rows = [shape["vocab_size"], *sizes, *unions]
    timed_rows = [row["rows"] for row in done.get("kernels", [])]
    print(f"{out}: {len(missing)} servers to measure, {len(arms) - len(missing)} kept", file=sys.stderr)
    failed: dict[str, str] = {}
    if missing or not {*rows} <= {*timed_rows}:
        if not torch.cuda.is_available():
            raise InputError("no GPU here; costs are measured on one")
        done["kernels"] = kernels(shape, [*sizes, *unions])
        torch.cuda.empty_cache()
        failed = measure_all(missing, args, flags, shape, out, done)
    measured = [row for arm in arms for row in done["arms"].get(arm.name, [])]
    by_name = {row["name"]: row for row in measured}
    pairs = [] if failed else [(size, u) for size, u in zip(sizes, unions, strict=True) if size in taus]
    report = {
        "gpu": done["fingerprint"]["gpu"],
        "kernels": [row for row in done["kernels"] if row["rows"] in rows],
        "arms": measured,
        "speeds": [row for size, union in pairs for row in speeds(by_name, taus[size], size, union)],
    }
    write_json(out / "cost.json", report)
    with atomic(out / "cost.md") as temporary:
        temporary.write_text(markdown(report), encoding="utf-8")
    write_provenance(out, vars(args) | {"sglang_flags": flags}, list(tau_files.values()))
    print(markdown(report))
    if failed:
        sys.exit(
            f"benchmarks.dynamic_vocabulary.cost: error: not measured: {failed}\n"
            "the same command tries these again"
        )


def arms_of(shape: dict, sizes: list[int], unions: list[int]) -> list[Arm]:
    """The whole head; each size as SGLang's static map and as ours; the unions as static maps."""
    arms = [Arm("full", shape["vocab_size"])]
    arms += [Arm(kind, rows) for rows in sizes for kind in ("stock", "auto")]
    return list(dict.fromkeys([*arms, *(Arm("stock", rows) for rows in unions)]))


def depends(args, shape: dict, flags: list[str]) -> dict:
    """What every figure of a run depends on; maps' sizes are in the arms' names."""
    settings = {name: getattr(args, name) for name in ("num_steps", "tau", "requests", "tokens")}
    settings |= {"shape": shape, "flags": flags, "gpu": gpu_name()}
    settings["environment"] = {k: v for k, v in sorted(os.environ.items()) if k.startswith("SGLANG_")}
    with contextlib.suppress(InputError):  # not needed to time the head alone
        settings["sglang"] = sglang.sglang_version()
    return fingerprint({}, settings)


def kept(path: Path, now: dict) -> dict:
    """What was measured before. InputError if it was under anything else.

    Without a GPU nothing can be added, and the figures may be reported again under the GPU they came from.
    """
    if not path.exists():
        return {"fingerprint": now, "arms": {}}
    done = read_json(path)
    before = done.get("fingerprint") or {}
    here = {} if now["gpu"] else {name: before.get(name) for name in ("gpu", "sglang")}
    if changed := differences(before, now | here):
        raise InputError(f"{path}: measured with other settings ({'; '.join(changed)}); name another --out")
    return done


def measure_all(
    arms: list[Arm], args, flags: list[str], shape: dict, out: Path, done: dict
) -> dict[str, str]:
    """Add the arms' rows to `done`, kept in OUT/measured.json; errors of those that failed, by name.

    `--at-once` servers start together, each is asked alone.
    """
    failures = {}
    write_json(out / "measured.json", done)
    if arms:
        sglang.sglang_version()
    with tqdm(total=len(arms), desc="servers", disable=None) as bar:
        for first in range(0, len(arms), args.at_once):
            group = arms[first : first + args.at_once]
            servers = [
                start(a, out / "model", args.port + i, args.tau, args.num_steps, flags, shape)
                for i, a in enumerate(group)
            ]
            with process.together(servers) as outcomes:
                for arm, server, failed in zip(group, servers, outcomes, strict=True):
                    try:
                        if failed:
                            raise failed
                        rows = asyncio.run(measure(server.url, arm, args.requests, args.tokens))
                    except (BackendError, process.ServerError) as error:
                        failures[arm.name] = str(error)
                        continue
                    if arm.kind == "auto":
                        rows[-1]["switches"] = switches_in(server.log)
                    done["arms"][arm.name] = rows
                    write_json(out / "measured.json", done)
                    bar.update()
    return failures


if __name__ == "__main__":
    run(main)
