"""Does vLLM sample as plain decoding does when the head drafts? A chi-square test over seeds, on the CPU.

    python -m benchmarks.engines.sampling --model models/smollm2-fastmtp --token-map vocab/smollm2/en_8k.pt \\
        --out results/vllm_sampling.md

Every arm answers one prompt with a few tokens under each seed. The first token comes from the prompt alone;
those after it come from verification, so each position's tokens are compared with plain decoding's. The last
arm is a planted error: drafts are accepted without a look at the backbone. It must fail and the others pass.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import chi2_contingency

from evaluation.backend_vllm import VllmServer
from fastmtp import files, markdown
from fastmtp.chat import prompt_ids
from fastmtp.cli import Parser, at_least, run
from fastmtp.engines import vllm
from fastmtp.engines.process import Server, free_ports
from fastmtp.tokenizer import load_tokenizer

TOKENS = 3  # per seed: the prompt's own, and two of the first verify pass
RARE = 10  # tokens seen less often in both arms together share a column
AT_ONCE = 32
PROMPT = [{"role": "user", "content": "Tell me something about an animal that you like."}]


@dataclass
class Arm:
    """name; drafts: what the speculative config says besides method and number; None: plain decoding."""

    name: str
    drafts: dict | None = None
    token_map: str | None = None


def arms(token_map: str) -> list[Arm]:
    """Plain, what is served, drafts that are sampled, and the planted error."""
    sampled = {"draft_sample_method": "probabilistic", "use_local_argmax_reduction": False}
    wrong = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [1.0, 1.0, 1.0]}
    return [
        Arm("plain"),
        Arm("plain, other seeds"),
        Arm("greedy drafts", {}),
        Arm("greedy drafts, map", {}, token_map),
        Arm("sampled drafts, map", sampled, token_map),
        Arm("accepted unseen", wrong),
    ]


def p_value(one: Sequence[int], other: Sequence[int]) -> float:
    """Chance of two samples that differ as much if both come from one distribution."""
    first, second = Counter(one), Counter(other)
    columns = {token: (first[token], second[token]) for token in first.keys() | second.keys()}
    table = [counts for counts in columns.values() if sum(counts) >= RARE]
    rest = [counts for counts in columns.values() if sum(counts) < RARE]
    if rest:
        table.append((sum(a for a, _ in rest), sum(b for _, b in rest)))
    return float(chi2_contingency(list(zip(*table, strict=True))).pvalue) if len(table) > 1 else 1.0


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
        "512",
        "--enforce-eager",
    ]
    steps = 0 if arm.drafts is None else args.num_steps
    line = vllm.command(args.model, steps, arm.token_map, 1, port, flags, engine=engine)
    if steps:
        place = line.index("--speculative-config") + 1
        line[place] = json.dumps(json.loads(line[place]) | arm.drafts)
    log = Path(args.out).with_suffix("") / f"{arm.name.replace(', ', '-').replace(' ', '-')}.log"
    with Server(line, port, log, env=vllm.environment(engine, args.model)) as server:
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


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "num_steps", "seeds")
    files.claim(args.out)
    ids = prompt_ids(load_tokenizer(args.model), PROMPT)
    plain, rows = None, []
    for number, arm in enumerate(arms(args.token_map)):
        seeds = range(number * args.seeds, (number + 1) * args.seeds)  # no arm shares a seed with another
        result = answers(args, arm, seeds, ids)
        plain = plain or result
        for temperature, texts in result.items():
            if texts is plain[temperature]:
                continue
            values = [
                p_value([text[i] for text in plain[temperature]], [text[i] for text in texts])
                for i in range(TOKENS)
            ]
            print(f"{arm.name}, temperature {temperature}: {values}", flush=True)
            rows.append([arm.name, f"{temperature:g}", *(f"{value:.2g}" for value in values)])
    head = ["arm", "temperature", *(f"p, token {i + 1}" for i in range(TOKENS))]
    text = (
        f"# vLLM's sampling with drafts\n\nvLLM {vllm.installed().version} (CPU build), float32, "
        f"{Path(args.model).name}, {args.seeds} seeds per arm, K={args.num_steps}. p: the chance of samples "
        "that differ from plain decoding's as much, if both come from one distribution.\n\n"
    )
    with files.atomic(args.out) as temporary:
        temporary.write_text(text + markdown.grid(head, rows, 1) + "\n", encoding="utf-8")
    files.write_provenance(args.out, vars(args))
    print(text)


if __name__ == "__main__":
    run(main)
