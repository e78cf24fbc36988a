"""Chooses how to draft: number of steps, chain or tree, and token map, for the most tokens per second.

    python -m fastmtp.plan --model models/mimo-7b-fastmtp --data data/answers.jsonl \\
        --costs results/speed/costs.json --token-map vocab/mimo/en_32k.pt --out plan.json
    python -m fastmtp.serve --model models/mimo-7b-fastmtp --plan plan.json

What drafts cost comes from your card (`python -m benchmarks.speed.run` measures it), what they bring from
your own answers: the model's accept length on them, without decoding. The method is in planning/choice.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmtp import files, hub
from fastmtp.budget.shapes import shape_of
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.samples import check_measurable, read_samples
from fastmtp.fingerprint import fingerprint
from fastmtp.inputs import shipped
from fastmtp.planning.choice import Choice, Judged, judge, memory, priced, steps_by_streams
from fastmtp.planning.costs import CostTable, check_shape, read_costs
from fastmtp.planning.plan_file import contents
from fastmtp.reference.model import check, load
from fastmtp.reference.teacher_forced import FULL
from fastmtp.show import markdown
from fastmtp.tokenizer import load_tokenizer
from fastmtp.vocab.draft_vocab import load_map
from fastmtp.vocab.token_map import short_names

SHOWN = 5
FEWEST = 4  # answers: two to fit on and two to judge on


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.plan",
        "Number of steps, tree and token map for the most tokens per second, from accept lengths on your "
        "answers and the costs of your card.",
        "python -m fastmtp.plan --model models/mimo-7b-fastmtp --data data/answers.jsonl \\\n"
        "    --costs results/speed/costs.json --token-map vocab/mimo/en_32k.pt --out plan.json",
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="exported model whose head will draft, or its ORG/NAME",
    )
    p.add_argument("--data", required=True, help="the model's own answers, distilled or curated")
    p.add_argument("--limit", type=int, help="use only the first N answers")
    p.add_argument("--costs", required=True, metavar="FILE", help="costs.json of benchmarks.speed.run")
    p.add_argument("--streams", type=int, default=1, help="requests served at once (default %(default)s)")
    p.add_argument(
        "--token-map",
        action="append",
        type=shipped,
        default=[],
        help="a map to consider (.pt); may be repeated",
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", required=True, metavar="FILE", help="the plan, for fastmtp.serve --plan")
    return p


def read_maps(paths: Sequence[str], tokenizer, vocab_size: int) -> dict[str, Tensor | None]:
    """Draft vocabularies by name; the whole one is None. Raises InputError."""
    names = short_names(paths, (FULL,))
    maps = {name: load_map(path, tokenizer, vocab_size) for name, path in zip(names, paths, strict=True)}
    return {FULL: None} | maps


def row(choice: Choice, judged: Judged, plain_ms: float, shape: dict, token_map: str | None) -> dict:
    """One choice as the plan's file has it."""
    d, speed = choice.drafts, choice.tokens_per_s(judged.tau)
    drafts = f"tree {d.topk},{d.num_steps},{d.nodes}" if d.topk > 1 else f"chain K={d.num_steps}"
    return {
        "name": f"{drafts}, {choice.map_name}",
        "num_steps": d.num_steps,
        "topk": d.topk,
        "nodes": d.nodes,
        "token_map": token_map and str(Path(token_map).resolve()),
        "token_map_content": fingerprint({"map": token_map}, {})["map"],
        "flags": list(choice.setting.flags),
        "environment": dict(choice.setting.environment),
        "tau": judged.tau,
        "interval": judged.acceptance.interval,
        "fixed_tree_tau": judged.fixed,
        "ms_per_cycle": choice.ms,
        "tokens_per_s": speed,
        "speedup": speed * plain_ms / (1000 * choice.streams),
        "memory_mib": memory(shape, d, token_map is not None),
    }


def table(rows: Sequence[dict]) -> str:
    """Markdown: what each choice is expected to bring, and its price in time and memory."""
    head = [
        "drafts, map",
        "tau",
        "95 %",
        "fixed tree's tau",
        "ms per cycle",
        "tokens/s",
        "speed-up",
        "map MiB",
    ]
    head += ["head's cache, MiB per 1,000 tokens", "drafts, MiB per stream"]
    lines = []
    for one in rows:
        interval = markdown.interval(one["interval"], ".3f")
        line = [one["name"], f"{one['tau']:.3f}", interval, markdown.number(one["fixed_tree_tau"], ".3f")]
        line += [f"{one['ms_per_cycle']:.2f}", f"{one['tokens_per_s']:.0f}", f"{one['speedup']:.2f}x"]
        lines.append(line + [f"{size:.1f}" for size in one["memory_mib"].values()])
    return markdown.grid(head, lines, text=1)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "streams", "limit")

    args.model = str(hub.model(args.model))
    args.token_map = [hub.token_map(path) for path in args.token_map]

    # Everything that can be wrong is read, and all that has no price left out, before the weights are read.
    config, tokenizer = check(args.model, args.device), load_tokenizer(args.model)
    costs, shape = read_costs(args.costs), shape_of(args.model)
    check_shape(costs, shape, args.costs, args.model)
    maps = read_maps(args.token_map, tokenizer, config.vocab_size)
    sizes = {name: config.vocab_size if ids is None else len(ids) for name, ids in maps.items()}
    choices = priced(costs, sizes, args.streams)
    samples = read_samples(args.data, config.vocab_size, args.limit, tokenizer)
    check_measurable(args.data, samples)
    if len(samples) < FEWEST:
        raise InputError(f"{args.data}: {len(samples)} answers; a plan needs at least {FEWEST} to judge by")
    files.claim(args.out)

    judged = judge(load(args.model, args.dtype, args.device), samples, maps, choices)
    write(args, costs, shape, choices, judged)


def write(args, costs: CostTable, shape: dict, choices: list[Choice], judged: dict) -> None:
    """Order the choices, print the best and write the plan."""
    paths = dict(zip(short_names(args.token_map), args.token_map, strict=True))
    plain_ms = costs.plain(args.streams)[1]

    def of(choice: Choice) -> Judged:
        return judged[choice.map_name, choice.shape]

    def shown(choice: Choice) -> dict:
        return row(choice, of(choice), plain_ms, shape, paths.get(choice.map_name))

    order = sorted(choices, key=lambda choice: -choice.tokens_per_s(of(choice).tau))
    depends = contents(args.model) | {
        "answers": args.data,
        "costs": args.costs,
        "token maps": [*paths.values()],
    }
    plan = {
        "fingerprint": fingerprint(
            depends, {"limit": args.limit, "dtype": args.dtype, "streams": args.streams}
        ),
        "streams": args.streams,
        "gpu": costs.gpu,
        "sglang": costs.sglang,
        "plain_tokens_per_s": 1000 * args.streams / plain_ms,
        "best": [shown(choice) for choice in order[:SHOWN]],
    }
    if chains := [choice for choice in order if choice.drafts.topk == 1]:
        taus = {c.drafts.num_steps: of(c).tau for c in chains if c.map_name == chains[0].map_name}
        plan["chain"] = shown(chains[0]) | {"steps_by_streams": steps_by_streams(costs, chains[0], taus)}
    files.write_json(args.out, plan)
    files.write_provenance(args.out, vars(args), [args.data, args.costs, *args.token_map])
    print(
        f"{len(choices)} ways to draft (streams: {args.streams}, card: {costs.gpu}); plain decoding "
        f"{plan['plain_tokens_per_s']:.0f} tokens/s. The best:\n\n{table(plan['best'])}\n\n"
        f"serve it: fastmtp serve --model {args.model} --plan {args.out}"
    )
    if plan["best"][0]["speedup"] < 1:
        print("none of them pays here: plain decoding is faster (fastmtp serve --no-spec)")


if __name__ == "__main__":
    run(main)
