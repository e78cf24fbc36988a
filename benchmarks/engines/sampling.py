"""Does an engine sample with drafts as it does without? Chi-square tests over many short answers.

    python -m benchmarks.engines.sampling --engine vllm --model models/smollm2-fastmtp \\
        --token-map vocab/smollm2/en_8k.pt --out results/vllm_sampling.md

Every arm continues one short text by a few tokens, many times. The first token comes from the prompt alone;
those after it come from verification. Each token, and each pair of neighbours, is compared with plain
decoding's. The last arm is a planted error: drafts are accepted without a look at the backbone. Exit code 1
unless it is caught and all others pass. vLLM's CPU build takes about fifteen minutes on two quiet cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.engines.chi_square import ALPHA, RARE, compare_answers
from benchmarks.engines.sampling_arms import ARMS, AT_ONCE, ENGINES, PLANTED, Arm
from fastmtp import files
from fastmtp.cli import Parser, at_least, run, split_at_dashes
from fastmtp.engines import process
from fastmtp.engines.sglang_flags import canonical
from fastmtp.fingerprint import gpu_name
from fastmtp.show import markdown
from fastmtp.tokenizer import load_tokenizer

TOKENS = 3  # per answer: the prompt's own, and two of the first verify pass
PROMPT = "My favourite animal is"  # short, because every answer reads it anew; many tokens can follow


async def sample(backend, ids: list[int], temperature: float, seeds: range) -> list[list[int]]:
    """One short answer per seed."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with backend as server:

        async def one(seed: int) -> list[int]:
            async with gate:
                return (await server.ask(ids, TOKENS, temperature, seed, ignore_eos=True)).output_ids

        return await asyncio.gather(*map(one, seeds))


def answers(args, engine, ids: list[int]) -> Iterator[tuple[Arm, dict[float, list[list[int]]]]]:
    """Each arm and its answers at each temperature. `--at-once` servers start side by side, and each is asked
    alone.
    """
    numbered = list(enumerate(ARMS))
    for first in range(0, len(ARMS), args.at_once):
        group = numbered[first : first + args.at_once]
        with contextlib.ExitStack() as stack:
            started = []
            for (number, arm), port in zip(group, process.free_ports(len(group)), strict=True):
                log = Path(args.out).with_suffix("") / f"{arm.name.replace(', ', '-').replace(' ', '-')}.log"
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                started.append(engine.server(args, arm, number, port, log, Path(folder)))
            outcomes = stack.enter_context(process.together([server for server, _ in started]))
            for (number, arm), (server, lines), error in zip(group, started, outcomes, strict=True):
                if error:
                    raise error
                server.require(lines)
                seeds = range(number * args.seeds, (number + 1) * args.seeds)  # no two arms share a seed
                yield (
                    arm,
                    {
                        t: asyncio.run(sample(engine.client(server.url), ids, t, seeds))
                        for t in args.temperatures
                    },
                )


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.engines.sampling",
        "Chi-square test of an engine's sampled tokens with drafts against plain decoding's. "
        "Flags after -- go to the engine.",
        "python -m benchmarks.engines.sampling --engine vllm --model models/smollm2-fastmtp "
        "--token-map vocab/smollm2/en_8k.pt --out results/vllm_sampling.md",
    )
    p.add_argument("--engine", choices=tuple(ENGINES), default="vllm", help="default %(default)s")
    p.add_argument("--model", required=True, metavar="FOLDER", help="folder written by fastmtp.export")
    p.add_argument("--token-map", required=True, metavar="PATH")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle (default %(default)s)")
    p.add_argument("--seeds", type=int, default=2000, help="answers per arm (default %(default)s)")
    p.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 1.0], help="default 0.6 1.0")
    p.add_argument(
        "--at-once", type=int, default=1, help="servers started side by side (default %(default)s)"
    )
    p.add_argument("--out", required=True, metavar="FILE.md")
    return p


def report(args, engine, rows: list[dict], verdict: str) -> str:
    """The table, with the conditions."""
    cells = [
        [
            row["arm"],
            f"{row['temperature']:g}",
            row["tokens"],
            str(row["outcomes"]),
            f"{row['statistic']:.1f}",
            str(row["freedom"]),
            f"{row['p']:.2g}",
        ]
        for row in rows
    ]
    head = ["arm", "temperature", "token", "outcomes", "chi-square", "degrees of freedom", "p"]
    place = gpu_name() if args.engine == "sglang" else f"{len(os.sched_getaffinity(0))} cores"
    flags = f" -- {' '.join(args.flags)}" if args.flags else ""
    return (
        f"# Sampling with drafts: {engine.name.split()[0]}\n\n"
        f"{Path(args.model).name} on {engine.name}, {place}, {engine.dtype}, K={args.num_steps}; "
        f"'{PROMPT}' continued by {TOKENS} tokens, {args.seeds} times per arm and temperature. "
        "p: the chance of samples that differ from plain decoding's as much, if both "
        f"come from one distribution. Outcomes seen less often than {RARE} times share a column.\n\n"
        "'plain, other seeds' is plain decoding once more. "
        f"'{PLANTED}' is a planted error: drafts are kept without a look at the backbone; its first token "
        "comes from the prompt's own pass, so it cannot differ.\n\n"
        f"{markdown.grid(head, cells, 1)}\n\n{verdict}\n\n"
        f"    python -m benchmarks.engines.sampling --engine {args.engine} --model {args.model} "
        f"--token-map {args.token_map} --seeds {args.seeds} --out {args.out}{flags}\n"
    )


def judge(rows: list[dict]) -> tuple[bool, str]:
    """(Whether the result is right, a sentence about it.)"""
    verified = [row for row in rows if row["arm"] != PLANTED]
    odd = [row for row in verified if row["p"] < ALPHA]
    caught = all(
        any(row["p"] < ALPHA for row in rows if row["arm"] == PLANTED and row["temperature"] == t)
        for t in {row["temperature"] for row in rows}
    )
    lowest = min(row["p"] for row in verified)
    text = f"Smallest p in {len(verified)} tests of arms that verify: {lowest:.2g}. "
    text += f"{len(odd)} of these tests found a difference from plain decoding (p < {ALPHA:g}). "
    text += f"The planted error is {'caught' if caught else 'NOT caught'} at every temperature."
    return caught and not odd, text


def main(argv: Sequence[str] | None = None) -> None:
    ours, flags = split_at_dashes(argv)
    args = parser().parse_args(ours)
    args.flags = canonical(flags) if args.engine == "sglang" else flags
    at_least(args, 1, "num_steps", "seeds", "at_once")
    engine = ENGINES[args.engine]()
    files.claim(args.out)
    ids = load_tokenizer(args.model)(PROMPT)["input_ids"]
    plain, rows = {}, []
    for arm, texts_by_temperature in answers(args, engine, ids):
        for temperature, texts in texts_by_temperature.items():
            if temperature not in plain:
                plain[temperature] = texts
                continue
            tests = compare_answers(plain[temperature], texts)
            rows += [{"arm": arm.name, "temperature": temperature} | asdict(test) for test in tests]
            print(arm.name, temperature, *(f"{test.tokens}: {test.p:.2g}" for test in tests), flush=True)
    right, verdict = judge(rows)
    text = report(args, engine, rows, verdict)
    with files.atomic(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    files.write_provenance(args.out, vars(args) | {"rows": rows})
    print(text)
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
