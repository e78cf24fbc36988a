"""Accept length (tau) and per-position rates of heads on finished answers, without decoding.

The computation is in reference/teacher_forced.py; this command reads the inputs, and writes tables and JSON.

    python -m fastmtp.acceptance --model models/smollm2 --data heldout.jsonl --num-steps 7 --at 1,3,5 \\
        --token-map vocab/smollm2/en_8k.pt
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmtp import files, hub
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.samples import check_measurable, read_samples
from fastmtp.inputs import shipped, whole_numbers
from fastmtp.reference.model import check, head_for, load, put_head
from fastmtp.reference.teacher_forced import FULL, as_json, measure_at, table
from fastmtp.tokenizer import load_tokenizer
from fastmtp.vocab.draft_vocab import AUTO, UNION, DraftVocab, load_map, parse_maps, union
from fastmtp.vocab.draft_vocab import read as read_vocab


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.acceptance",
        "Accept length and per-position rates of a head on finished answers, from one teacher-forced pass.",
        "python -m fastmtp.acceptance --model models/smollm2-fastmtp --data data/heldout.jsonl \\\n"
        "    --num-steps 7 --at 1,3,5 --token-map vocab/smollm2/en_8k.pt",
    )
    p.add_argument("--model", required=True, help="model folder, or ORG/NAME on a hub")
    p.add_argument(
        "--head",
        action="append",
        help="a checkpoint, a shipped head or one on a hub, instead of the model's own; may be repeated",
    )
    p.add_argument(
        "--data", required=True, help="distilled or curated samples (greedy ones predict greedy decoding)"
    )
    p.add_argument("--limit", type=int, help="use only the first N samples")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle, K (default 3)")
    p.add_argument("--at", help="tau for these smaller K too, from the same pass, such as 1,3,5")
    p.add_argument(
        "--token-map",
        action="append",
        type=shipped,
        default=[],
        help="also with this map (.pt), or ORG/NAME/FILE.pt on a hub; may be repeated",
    )
    p.add_argument(
        "--token-maps",
        metavar="EN=PATH,ZH=PATH",
        help="also with each of these, their mix, their union, and following the language",
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", help="also write the figures as JSON")
    p.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    return p


def read_maps(args, tokenizer, vocab_size: int) -> tuple[dict[str, Tensor], DraftVocab | None]:
    """The maps of --token-map by name, and those of --token-maps with their union. Raises InputError."""
    maps: dict[str, Tensor] = {}
    for path in args.token_map:
        name = Path(path).stem
        if name in maps or name in (FULL, AUTO, UNION):
            raise InputError(f"--token-map {path}: the name '{name}' is taken; rename or copy the file")
        maps[name] = load_map(path, tokenizer, vocab_size)
    if not args.token_maps:
        return maps, None
    vocab = read_vocab(args.token_maps, AUTO, tokenizer, vocab_size)
    twice = sorted(maps.keys() & vocab.maps.keys())
    if twice:
        raise InputError(f"--token-maps: '{twice[0]}' is also the name of a --token-map; rename one of them")
    return maps | {UNION: union(vocab.maps)}, vocab


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "num_steps", "limit")
    at = sorted({args.num_steps, *whole_numbers("--at", args.at or "")})
    if at[0] < 1 or at[-1] > args.num_steps:
        raise InputError(f"--at must lie between 1 and --num-steps {args.num_steps}, not {args.at}")

    # Everything that can be wrong is read before the weights are.
    heads = args.head or [args.model]
    args.model = str(hub.model(args.model))
    args.token_map = [hub.token_map(path) for path in args.token_map]
    config, tokenizer = check(args.model, args.device), load_tokenizer(args.model)
    maps, vocab = read_maps(args, tokenizer, config.vocab_size)
    samples = read_samples(args.data, config.vocab_size, args.limit, tokenizer)
    check_measurable(args.data, samples)
    heads = {name: head_for(name if args.head else args.model, config) for name in heads}
    if args.out:
        files.claim(args.out)

    model = load(args.model, args.dtype, args.device)
    rows, tables = {steps: [] for steps in at}, []
    for name, head in heads.items():
        put_head(model.net, name if args.head else args.model, head)
        for steps, results in measure_at(model, samples, at, maps, None, vocab).items():
            rows[steps] += as_json(results, name)
            tables.append(f"head: {name}, K={steps}\n\n{table(results)}\n")
    figures = {"num_steps": args.num_steps, "rows": rows.pop(args.num_steps), "at": rows}
    if args.out:
        files.write_json(args.out, figures)
        sources = [*args.token_map, *(parse_maps(args.token_maps).values() if args.token_maps else [])]
        files.write_provenance(args.out, vars(args), [args.data, *sources])
    print(json.dumps(figures, ensure_ascii=False) if args.json else "\n".join(tables))


if __name__ == "__main__":
    run(main)
