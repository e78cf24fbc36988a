"""How fast answers can be distilled: output tokens per second over engines on one GPU and chats in flight.

The engines are started once; each combination answers its own part of the prompts with some of them, and
every answer is kept as a distilled sample. `--all` then answers all that is left with the best combination.
Options that are not listed here are those of fastmtp.distill.

    python -m benchmarks.distill --try 1x1024 2x2048 4x4096 --all --model models/smollm2 \\
        --prompts data/pairs/*_en.jsonl.gz --max-new-tokens 512 --out results/distill/distilled.jsonl
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from fastmtp import distill
from fastmtp.cli import InputError, Parser, run
from fastmtp.data.engines import engines
from fastmtp.data.journal import Journal
from fastmtp.data.prompts import Chat
from fastmtp.files import atomic, claim, write_json

HEAD = "| run | engines | in flight | prompts | output tokens | seconds | tokens/s | tokens/s, middle half |"
WARM = 64  # prompts an engine that are not measured: its first ones compile kernels
RULE = "|---|---:|---:|---:|---:|---:|---:|---:|"


class Clock(Journal):
    """A journal that notes when each answer came and how long it is."""

    def write(self, sample: dict) -> None:
        super().write(sample)
        tokens = sum(len(m.get("token_ids", ())) for m in sample["messages"])
        self.times.append((time.perf_counter(), tokens))


def figures(times: list[tuple[float, int]], started: float) -> dict:
    """Prompts, tokens, seconds, tokens/s over all and between the first and the last quarter of the
    answers.
    """
    tokens, seconds = sum(n for _, n in times), times[-1][0] - started
    quarter = len(times) // 4
    middle = times[quarter : len(times) - quarter]
    steady = sum(n for _, n in middle[1:]) / max(middle[-1][0] - middle[0][0], 1e-9)
    return {
        "prompts": len(times),
        "output_tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(tokens / seconds),
        "steady_tokens_per_s": round(steady),
    }


def line(row: dict) -> str:
    cells = [row["run"], row["engines"], row["in_flight"], f"{row['prompts']:,}", f"{row['output_tokens']:,}"]
    return (
        "| "
        + " | ".join(
            map(str, [*cells, row["seconds"], f"{row['tokens_per_s']:,}", f"{row['steady_tokens_per_s']:,}"])
        )
        + " |"
    )


class Part:
    """Some of the prompts, in the form that distill takes all of them in."""

    def __init__(self, chats: list[Chat]):
        self.part = chats

    def chats(self):
        return iter(self.part)


def measure(
    name: str, urls: list[str], in_flight: int, part: list[Chat], args, journal: Clock, left_s: float
) -> dict | None:
    """Answer `part` within `left_s` seconds; None when nothing came back in that time."""
    args.in_flight, journal.times = in_flight, []
    started = time.perf_counter()

    async def bounded() -> None:
        with tqdm(
            total=len(part), desc=f"{name} {len(urls)}x{in_flight}", unit="prompt", disable=None
        ) as bar:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left_s, 1)):
                    await distill.ask_servers(urls, args, Part(part), journal, bar)

    asyncio.run(bounded())
    if not journal.times:
        return None
    row = {"run": name, "engines": len(urls), "in_flight": in_flight, **figures(journal.times, started)}
    print(line(row), flush=True)
    return row


def report(rows: list[dict], start_s: float, answered: int) -> str:
    """The results file: machine, command, table."""
    gpu = torch.cuda.get_device_properties(0)
    command = shlex.join(["python", *sys.argv]).replace(" --", " \\\n    --")
    return (
        f"# Distillation speed\n\nMachine: {gpu.name} ({gpu.total_memory / 1e9:.0f} GB), {os.cpu_count()} "
        f"cores. The engines took "
        f"{start_s:g} s to start. {answered:,} prompts answered in "
        f"all.\n\n```sh\n{command}\n```\n\n{HEAD}\n{RULE}\n"
        + "\n".join(map(line, rows))
        + "\n\nSeconds and tokens/s run from the first request to the last answer; the middle half leaves "
        "out how a run fills up and runs dry.\n"
    )


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.distill",
        "Measure distillation over engines and chats in flight; other options are fastmtp.distill's.",
        "python -m benchmarks.distill --try 1x1024 4x4096 --all --model models/smollm2 \\\n"
        "    --prompts examples/prompts.jsonl --max-new-tokens 512 --out build/distill/distilled.jsonl",
    )
    p.add_argument(
        "--try",
        dest="combinations",
        nargs="+",
        required=True,
        metavar="ENGINESxFLIGHT",
        help="such as 2x1024",
    )
    p.add_argument(
        "--rounds",
        type=int,
        default=4,
        help="prompts a combination, per chat in flight (default %(default)s)",
    )
    p.add_argument("--all", action="store_true", help="then answer the rest with the best combination")
    p.add_argument("--results", metavar="MD", help="write the table there, with the machine and the command")
    p.add_argument(
        "--stop-after",
        type=float,
        default=1e9,
        metavar="S",
        help="end after so many seconds with what there is",
    )
    return p


def main() -> None:
    begun = time.perf_counter()
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    own, rest = parser().parse_known_args(argv[:cut])
    args = distill.parser().parse_args(rest)
    distill.check(args, [])
    try:
        combinations = [tuple(map(int, text.split("x"))) for text in own.combinations]
        most, deepest = max(e for e, _ in combinations), max(-(-f // e) for e, f in combinations)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--try {' '.join(own.combinations)}: give pairs such as 2x1024") from None
    questions, rows = distill.Questions(args), []
    out = Path(args.out)
    for path in filter(None, (own.results, out.with_suffix(".bench.json"))):
        claim(path)

    def left() -> float:
        return own.stop_after - (time.perf_counter() - begun)

    with Clock(out, questions.keys) as journal:
        todo = [chat for chat in questions.chats() if chat.key not in journal.done]
        random.Random(args.seed).shuffle(todo)  # so that every combination answers the same mix
        with engines(
            args.model, most, most * deepest, args.dtype, argv[cut + 1 :], out.parent / "logs"
        ) as urls:
            start_s = round(time.perf_counter() - begun, 1)
            print(f"{most} engines answer after {start_s} s\n\n{HEAD}\n{RULE}", flush=True)
            warm, todo = todo[: WARM * most], todo[WARM * most :]
            measure("warm-up", urls, WARM * most, warm, args, journal, left())
            for count, flight in combinations:
                part, todo = todo[: own.rounds * flight], todo[own.rounds * flight :]
                if (
                    part
                    and left() > 10
                    and (row := measure("try", urls[:count], flight, part, args, journal, left()))
                ):
                    rows.append(row)
            if own.all and todo and rows:
                best = max(rows, key=lambda row: row["steady_tokens_per_s"])
                rows.append(
                    measure("all", urls[: best["engines"]], best["in_flight"], todo, args, journal, left())
                )
            rows = [row for row in rows if row]
            if own.results:
                with atomic(own.results) as temporary:
                    temporary.write_text(report(rows, start_s, len(journal.done)), encoding="utf-8")
            write_json(
                out.with_suffix(".bench.json"),
                {"start_s": start_s, "rows": rows, "answers": len(journal.done)},
            )
    print(
        f"\n{json.dumps({'answers': len(journal.done), 'failed': journal.failed, 'of': len(questions.keys)})}"
    )


if __name__ == "__main__":
    run(main)
