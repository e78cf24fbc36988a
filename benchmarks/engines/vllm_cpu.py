"""Tokens per second of vLLM's CPU build: plain, with the head's drafts, with drafts from a token map.

    python -m benchmarks.engines.vllm_cpu --model models/smollm2-fastmtp --token-map vocab/smollm2/en_8k.pt \\
        --out results/vllm_cpu.md

All servers of one mode (eager or compiled) are up together and asked in turn, one request at a time, so what
else the machine does meets every arm. Each round asks every arm every prompt; a figure is the median round.
Timed is decoding alone: tokens after the first message, over the seconds after it.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from evaluation.backend_vllm import VllmServer, flags
from evaluation.backends import Turn
from fastmtp import files
from fastmtp.chat import prompt_ids
from fastmtp.cli import Parser, at_least, run
from fastmtp.data.prompts import read_prompts
from fastmtp.engines import vllm
from fastmtp.engines.process import Server, free_ports, together
from fastmtp.engines.request import Serving
from fastmtp.show import markdown
from fastmtp.tokenizer import load_tokenizer

MODES = {"eager": ["--enforce-eager"], "compiled": []}
ONE = ["--max-num-seqs", "1", "--max-model-len", "2048"]


def rate(turns: Sequence[Turn]) -> float:
    """Tokens per second after the first message."""
    tokens = sum(len(turn.output_ids) - turn.first_tokens for turn in turns)
    return tokens / sum(turn.latency_s - turn.first_s for turn in turns)


def accept_length(turns: Sequence[Turn]) -> float | None:
    """Output tokens per verify pass; None for plain decoding."""
    passes = [turn.verify_passes for turn in turns]
    return None if None in passes else sum(len(turn.output_ids) for turn in turns) / sum(passes)


async def ask(urls: dict[str, str], prompts: list[list[int]], tokens: int, rounds: int) -> dict[str, list]:
    """Each arm's rounds of answers, after one round of one prompt that warms it up."""
    answers: dict[str, list[list[Turn]]] = {arm: [] for arm in urls}
    for turn in range(-1, rounds):
        for arm, url in urls.items():
            async with VllmServer(url) as server:
                asked = [await server.ask(ids, tokens) for ids in (prompts if turn >= 0 else prompts[:1])]
            if turn >= 0:
                answers[arm].append(asked)
                print(f"round {turn + 1}, {arm}: {rate(asked):.1f} tokens per second", flush=True)
    return answers


def measure(args, mode: str, prompts: list[list[int]]) -> list[dict]:
    """One row per arm."""
    engine = vllm.installed()
    arms = {"plain": (0, None), f"K={args.num_steps}": (args.num_steps, None)}
    if args.token_map:
        arms[f"K={args.num_steps}, {Path(args.token_map).stem}"] = (args.num_steps, args.token_map)
    common = ["--dtype", args.dtype, *ONE, *MODES[mode]]
    servers = []
    for port, (steps, token_map) in zip(free_ports(len(arms)), arms.values(), strict=True):
        own = [*common, *flags(engine, steps)]
        line = vllm.command(Serving(args.model, steps, token_map, port=port, flags=own), engine)
        log = Path(args.out).with_suffix("") / f"{mode}-{len(servers)}.log"
        servers.append(Server(line, port, log, env=vllm.environment(engine, args.model)))
    with together(servers) as outcomes:
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        urls = {arm: server.url for arm, server in zip(arms, servers, strict=True)}
        load = os.getloadavg()[0]
        answers = asyncio.run(ask(urls, prompts, args.max_new_tokens, args.rounds))
    rows = []
    for arm, asked in answers.items():
        rates = [rate(turns) for turns in asked]
        row = {"mode": mode, "arm": arm, "rates": rates, "median": statistics.median(rates)}
        rows.append(row | {"accept_length": accept_length(asked[0]), "load": load})
    return rows


def report(rows: list[dict], args, version: str, prompts: int) -> str:
    """The table, with the conditions."""
    plain = {row["mode"]: row["median"] for row in rows if row["arm"] == "plain"}
    cells = [
        [
            row["mode"],
            row["arm"],
            f"{row['median']:.1f}",
            f"{row['median'] / plain[row['mode']]:.2f}",
            markdown.number(row["accept_length"], ".3f"),
            ", ".join(f"{one:.1f}" for one in row["rates"]),
        ]
        for row in rows
    ]
    head = ["mode", "arm", "tokens per second", "speed-up", "accept length", "all rounds"]
    loads = {row["mode"]: f"{row['mode']} {row['load']:.1f}" for row in rows}
    return (
        f"# vLLM on the CPU\n\n{Path(args.model).name} on vLLM {version} (CPU build), "
        f"{len(os.sched_getaffinity(0))} cores, {args.dtype}, one request at a time, {prompts} prompts of "
        f"up to {args.max_new_tokens} tokens, greedy, median of {args.rounds} rounds.\n\n"
        f"{markdown.grid(head, cells, 2)}\n\n"
        f"Load average when the first round began: {', '.join(loads.values())}.\n"
    )


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.engines.vllm_cpu",
        "Tokens per second of vLLM's CPU build: plain, drafts, drafts from a token map.",
        "python -m benchmarks.engines.vllm_cpu --model models/smollm2-fastmtp "
        "--token-map vocab/smollm2/en_8k.pt --out results/vllm_cpu.md",
    )
    p.add_argument("--model", required=True, metavar="FOLDER", help="folder written by fastmtp.export")
    p.add_argument("--token-map", metavar="PATH", help="a third arm drafts from this map")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle (default %(default)s)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    p.add_argument("--mode", choices=("eager", "compiled", "both"), default="both")
    p.add_argument(
        "--prompts", default="examples/prompts.jsonl", help="default %(default)s, its held-out rows"
    )
    p.add_argument("--limit", type=int, default=4, help="prompts per round (default %(default)s)")
    p.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    p.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    p.add_argument("--out", required=True, metavar="FILE.md")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "num_steps", "limit", "max_new_tokens", "rounds")
    files.claim(args.out)
    tokenizer = load_tokenizer(args.model)
    rows = read_prompts(args.prompts, "heldout", args.limit)
    prompts = [prompt_ids(tokenizer, row["messages"]) for row in rows]
    results = []
    for mode in MODES if args.mode == "both" else (args.mode,):
        results += measure(args, mode, prompts)
    text = report(results, args, vllm.installed().version, len(prompts))
    with files.atomic(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    files.write_provenance(args.out, vars(args) | {"rows": results}, [args.prompts])
    print(text)


if __name__ == "__main__":
    run(main)
