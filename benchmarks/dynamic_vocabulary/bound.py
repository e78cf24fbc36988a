"""What a token map leaves of a head that is always right: the accept length that no head passes with it.

A draft outside the map cannot be made, however good the head; so a trained head lies between no drafts and
this. The file has the form of fastmtp.acceptance's, for `benchmarks.dynamic_vocabulary.cost --taus`.

    python -m benchmarks.dynamic_vocabulary.bound --tokenizer models/qwen --data heldout.jsonl \\
        --out bound_16k.json \\
        --token-maps en=vocab/qwen2/en_16k.pt,zh=vocab/qwen2/zh_16k.pt,mixed=vocab/qwen2/union_16k.pt
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from tqdm import tqdm

from fastmtp import files
from fastmtp.cli import Parser, at_least, run
from fastmtp.data.samples import check_measurable, read_samples
from fastmtp.head.recursion import shift
from fastmtp.reference.teacher_forced import FULL, as_json, followed, table
from fastmtp.tau import Acceptance, walk
from fastmtp.tokenizer import load_tokenizer
from fastmtp.vocab.draft_vocab import AUTO, UNION, DraftVocab, parse_maps, union
from fastmtp.vocab.draft_vocab import read as read_vocab


def possible(output_ids: list[int], allowed: Tensor | None, num_steps: int) -> Tensor:
    """hits [n-1, K] of acceptance.walk for drafts that are right if `allowed` (ids; None: all) has the
    token.
    """
    ids = torch.tensor(output_ids)
    right = torch.ones_like(ids, dtype=torch.bool) if allowed is None else torch.isin(ids, allowed)
    return torch.stack([shift(right[None], k)[0, :-1] for k in range(1, num_steps + 1)], dim=1)


def bound(vocab: DraftVocab, samples: list[dict], num_steps: int) -> dict[tuple[str, str, str], Acceptance]:
    """Results in acceptance's form: the whole head, each map, their union, and following."""
    maps = {FULL: None} | vocab.maps | {UNION: union(vocab.maps)}
    results: dict[tuple[str, str, str], Acceptance] = defaultdict(Acceptance)
    for sample in tqdm(samples, desc="bound", unit="sample"):
        prompt, output = sample["prompt_ids"], sample["output_ids"]
        hits = {name: possible(output, ids, num_steps) for name, ids in maps.items()}
        hits[AUTO] = followed(vocab, prompt, output, hits)
        for name, rows in hits.items():
            results[sample.get("source", ""), sample.get("lang", ""), name].add(len(output), walk(rows))
    return results


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.dynamic_vocabulary.bound",
        "The accept length of a head that is always right, with each map and with the map of the language.",
        "python -m benchmarks.dynamic_vocabulary.bound --tokenizer models/qwen --data heldout.jsonl --out "
        "bound_16k.json \\\n"
        "    --token-maps en=vocab/qwen2/en_16k.pt,zh=vocab/qwen2/zh_16k.pt,mixed=vocab/qwen2/union_16k.pt",
    )
    p.add_argument("--tokenizer", required=True, help="model or tokenizer folder")
    p.add_argument("--data", required=True, help="distilled samples")
    p.add_argument("--token-maps", required=True, metavar="EN=PATH,ZH=PATH")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle (default %(default)s)")
    p.add_argument("--out", required=True, metavar="JSON")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "num_steps")
    files.claim(args.out)
    tokenizer = load_tokenizer(args.tokenizer)
    vocab = read_vocab(args.token_maps, AUTO, tokenizer, len(tokenizer))
    samples = read_samples(args.data, len(tokenizer))
    check_measurable(args.data, samples)
    results = bound(vocab, samples, args.num_steps)
    files.write_json(args.out, {"num_steps": args.num_steps, "rows": as_json(results, "always right")})
    files.write_provenance(args.out, vars(args), [args.data, *parse_maps(args.token_maps).values()])
    print(table(results))


if __name__ == "__main__":
    run(main)
