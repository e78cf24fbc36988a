"""Does vLLM sample as plain decoding does when the head drafts? A chi-square test over seeds, on the CPU.

    python -m benchmarks.engines.sampling --model models/smollm2-fastmtp --token-map vocab/smollm2/en_8k.pt \\
        --out results/vllm_sampling.md

Every arm continues one short text by a few tokens under each seed. The first token comes from the prompt
alone; those after it come from verification, so each position's tokens are compared with plain decoding's.
The last arm is a planted error: drafts are accepted without a look at the backbone. Exit code 1 unless it is
caught and all others pass. About fifteen minutes on two quiet cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy.stats import chi2_contingency

from evaluation.backend_vllm import VllmServer
from fastmtp import files
from fastmtp.cli import Parser, at_least, run
from fastmtp.engines import vllm
from fastmtp.engines.process import Server, free_ports
from fastmtp.engines.request import Serving
from fastmtp.show import markdown
from fastmtp.tokenizer import load_tokenizer

TOKENS = 3  # per seed: the prompt's own, and two of the first verify pass
RARE = 10  # tokens seen less often in both arms together share a column
AT_ONCE = 128
PROMPT = "My favourite animal is"  # short, because every seed reads it anew; many tokens can follow
ALPHA = (
    1e-3  # a p below it is a difference; some thirty tests of the same distribution give one in 3 % of runs
)
PLANTED = "accepted unseen"


@dataclass
class Arm:
    """name; drafts: what the speculative config says besides method and number; None: plain decoding."""

    name: str
    drafts: dict | None = None
    token_map: str | None = None


# A plugin of vLLM's: the rule accepts a draft if p/q is at least a uniform number, and that is now always 0.
ACCEPT_ALL = """def register():
    from vllm.v1.sample import rejection_sampler
    draw = rejection_sampler.generate_uniform_probs
    rejection_sampler.generate_uniform_probs = lambda *args, **names: draw(*args, **names).zero_()
"""


def plant(folder: Path) -> dict[str, str]:
    """Write the plugin into `folder` as an installed package; the environment in which vLLM loads it."""
    (folder / "accept_all.py").write_text(ACCEPT_ALL, encoding="utf-8")
    about = folder / "accept_all-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: accept-all\nVersion: 1\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(
        "[vllm.general_plugins]\naccept_all = accept_all:register\n", encoding="utf-8"
    )
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def arms(token_map: str) -> list[Arm]:
    """Plain, what is served, drafts that are sampled, and the planted error."""
    sampled = {"draft_sample_method": "probabilistic", "use_local_argmax_reduction": False}
    return [
        Arm("plain"),
        Arm("plain, other seeds"),
        Arm("greedy drafts", {}),
        Arm("greedy drafts, map", {}, token_map),
        Arm("sampled drafts, map", sampled, token_map),
        Arm(PLANTED, {}),
    ]


@dataclass
class Test:
    """A chi-square test of two samples of tokens. counts: of the tokens seen, those of either sample."""

    statistic: float
    freedom: int
    p: float
    counts: dict[int, tuple[int, int]]


def compare(one: Sequence[int], other: Sequence[int]) -> Test:
    """p: the chance of two samples that differ as much if both come from one distribution."""
    first, second = Counter(one), Counter(other)
    counts = {token: (first[token], second[token]) for token in sorted(first.keys() | second.keys())}
    table = [pair for pair in counts.values() if sum(pair) >= RARE]
    rest = [pair for pair in counts.values() if sum(pair) < RARE]
    if rest:
        table.append((sum(a for a, _ in rest), sum(b for _, b in rest)))
    if len(table) < 2:
        return Test(0.0, 0, 1.0, counts)
    result = chi2_contingency(list(zip(*table, strict=True)))
    return Test(float(result.statistic), int(result.dof), float(result.pvalue), counts)


async def sample(url: str, ids: list[int], temperature: float, seeds: range) -> list[list[int]]:
    """One short answer per seed."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with VllmServer(url, alone=False) as server:

        async def one(seed: int) -> list[int]:
            async with gate:
                return (await server.ask(ids, TOKENS, temperature, seed, ignore_eos=True)).output_ids

        return await asyncio.gather(*map(one, seeds))


def answers(args, arm: Arm, seeds: range, ids: list[int]) -> dict[float, list[list[int]]]:
    """The arm's answers at each temperature."""
    engine, port = vllm.installed(), free_ports(1)[0]
    flags = [
        "--dtype",
        "float32",
        "--max-num-seqs",
        str(AT_ONCE),
        "--max-model-len",
        "256",
        "--enforce-eager",
    ]
    steps = 0 if arm.drafts is None else args.num_steps
    serving = Serving(args.model, steps, arm.token_map, port=port, flags=flags)
    line = vllm.command(serving, engine)
    if steps:
        place = line.index("--speculative-config") + 1
        line[place] = json.dumps(json.loads(line[place]) | arm.drafts)
    log = Path(args.out).with_suffix("") / f"{arm.name.replace(', ', '-').replace(' ', '-')}.log"
    env = vllm.environment(engine, args.model)
    with tempfile.TemporaryDirectory() as folder:
        if arm.name == PLANTED:
            env |= plant(Path(folder))
        with Server(line, port, log, env=env) as server:
            return {t: asyncio.run(sample(server.url, ids, t, seeds)) for t in args.temperatures}


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.engines.sampling",
        "Chi-square test of vLLM's sampled tokens with drafts against plain decoding's.",
        "python -m benchmarks.engines.sampling --model models/smollm2-fastmtp "
        "--token-map vocab/smollm2/en_8k.pt --out results/vllm_sampling.md",
    )
    p.add_argument("--model", required=True, metavar="FOLDER", help="folder written by fastmtp.export")
    p.add_argument("--token-map", required=True, metavar="PATH")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle (default %(default)s)")
    p.add_argument("--seeds", type=int, default=2000, help="answers per arm (default %(default)s)")
    p.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 1.0], help="default 0.6 1.0")
    p.add_argument("--out", required=True, metavar="FILE.md")
    return p


def report(args, version: str, rows: list[dict], verdict: str) -> str:
    """The table, with the conditions."""
    cells = [
        [
            row["arm"],
            f"{row['temperature']:g}",
            str(row["token"]),
            str(len(row["counts"])),
            f"{row['statistic']:.1f}",
            str(row["freedom"]),
            f"{row['p']:.2g}",
        ]
        for row in rows
    ]
    head = ["arm", "temperature", "token", "different tokens", "chi-square", "degrees of freedom", "p"]
    return (
        f"# vLLM's sampling with drafts\n\n{Path(args.model).name} on vLLM {version} (CPU build), "
        f"{len(os.sched_getaffinity(0))} cores, float32, K={args.num_steps}; '{PROMPT}' continued by "
        f"{TOKENS} tokens under {args.seeds} seeds per arm and temperature. "
        "p: the chance of samples that differ from "
        "plain decoding's as much, if both come from one distribution. Tokens seen less often than "
        f"{RARE} times share a column.\n\n{markdown.grid(head, cells, 1)}\n\n{verdict}\n\n"
        f"    python -m benchmarks.engines.sampling --model {args.model} --token-map {args.token_map} "
        f"--seeds {args.seeds} --out {args.out}\n"
    )


def judge(rows: list[dict]) -> tuple[bool, str]:
    """(Whether the result is right, a sentence about it.)"""
    odd = [row for row in rows if row["arm"] != PLANTED and row["p"] < ALPHA]
    lowest = min(row["p"] for row in rows if row["arm"] != PLANTED)
    caught = all(
        any(row["p"] < ALPHA for row in rows if row["arm"] == PLANTED and row["temperature"] == t)
        for t in {row["temperature"] for row in rows}
    )
    text = f"Smallest p of the arms that verify: {lowest:.2g}. "
    text += f"{len(odd)} of them differ from plain decoding (p < {ALPHA:g}). "
    text += f"The planted error is {'caught' if caught else 'NOT caught'} at every temperature."
    return caught and not odd, text


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "num_steps", "seeds")
    files.claim(args.out)
    ids = load_tokenizer(args.model)(PROMPT)["input_ids"]
    plain, rows = {}, []
    for number, arm in enumerate(arms(args.token_map)):
        seeds = range(number * args.seeds, (number + 1) * args.seeds)  # no arm shares a seed with another
        for temperature, texts in answers(args, arm, seeds, ids).items():
            if temperature not in plain:
                plain[temperature] = texts
                continue
            columns = zip(zip(*plain[temperature], strict=True), zip(*texts, strict=True), strict=True)
            tests = [compare(one, other) for one, other in columns]
            about = {"arm": arm.name, "temperature": temperature}
            rows += [about | {"token": i + 1} | asdict(test) for i, test in enumerate(tests)]
            print(arm.name, temperature, *(f"{test.p:.2g}" for test in tests), flush=True)
    right, verdict = judge(rows)
    text = report(args, vllm.installed().version, rows, verdict)
    with files.atomic(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    files.write_provenance(args.out, vars(args) | {"rows": rows})
    print(text)
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
