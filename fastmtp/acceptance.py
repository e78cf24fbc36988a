"""Accept length (tau) and per-position rates without decoding: one teacher-forced pass over finished answers.

Greedy drafts that were accepted equal the text, so the chain that an engine would draft at any anchor is the chain
over the text itself, up to its first miss. Computing all anchors at once in `exact` mode (recursion.py) and walking
the answer from one verify pass to the next gives what the decoder would have counted, for the cost of one forward.

    python -m fastmtp.acceptance --model models/smollm2 --data heldout.jsonl --num-steps 3 --token-map vocab/smollm2/en_8k.pt
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastmtp import files
from fastmtp.cli import InputError, Parser, run
from fastmtp.decoding import Model, load, position_rates
from fastmtp.export import read_head
from fastmtp.token_map import load_token_map

FULL = "full"


@dataclass
class Acceptance:
    """Pooled counts. histogram[j]: verify passes with exactly j accepted drafts."""

    output_tokens: int = 0
    histogram: list[int] = field(default_factory=list)

    def add(self, output_tokens: int, histogram: list[int]) -> None:
        self.output_tokens += output_tokens
        self.histogram = [a + b for a, b in zip(self.histogram or [0] * len(histogram), histogram, strict=True)]

    @property
    def verify_passes(self) -> int:
        return sum(self.histogram)

    @property
    def accept_length(self) -> float:
        """tau: output tokens per verify pass."""
        return self.output_tokens / self.verify_passes if self.verify_passes else 1.0

    @property
    def position_rates(self) -> list[float]:
        return position_rates(self.histogram)


def walk(hits: Tensor) -> list[int]:
    """Histogram of accepted drafts of one answer. hits: [n-1, K] bool, row i: the anchor whose next token is answer
    token i; hits[i, k] says that draft k+1 equals answer token i+k+1 (False past the end). n: answer tokens.

    The first answer token comes from the prefill; each pass then keeps its accepted drafts and one more token.
    """
    prefixes = hits.long().cumprod(1).sum(1).tolist()
    histogram = [0] * (hits.shape[1] + 1)
    at, remaining = 0, hits.shape[0]
    while remaining > 0:
        accepted = min(prefixes[at], remaining)
        histogram[accepted] += 1
        at += accepted + 1
        remaining -= accepted + 1
    return histogram


@torch.inference_mode()
def draft_hits(
    model: Model, samples: list[tuple[list[int], list[int]]], num_steps: int, token_maps: dict[str, Tensor | None]
) -> list[dict[str, Tensor]]:
    """For each (prompt ids, output ids): {map name: hits [n-1, K]} (see `walk`), from one padded forward pass."""
    net = model.net
    device = net.lm_head.weight.device
    longest = max(len(p) + len(o) for p, o in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, output) in enumerate(samples):
        ids[row, : len(prompt) + len(output)] = torch.tensor(prompt + output)
        mask[row, : len(prompt) + len(output)] = 1
    _, states, _ = net.mtp_states(ids.to(device), mask.to(device), num_steps=num_steps, attention="exact")
    token_maps = {name: None if map_ is None else map_.to(device) for name, map_ in token_maps.items()}
    weights = {n: net.lm_head.weight if map_ is None else net.lm_head.weight[map_] for n, map_ in token_maps.items()}
    results = []
    for row, (prompt, output) in enumerate(samples):
        start, anchors = len(prompt) - 1, len(output) - 1
        text = torch.tensor(output, device=device)
        found = {}
        for name, map_ in token_maps.items():
            hits = torch.zeros(anchors, num_steps, dtype=torch.bool)
            for step, state in enumerate(states):
                count = anchors - step
                if count > 0:
                    rows = F.linear(state[row, start : start + count], weights[name]).argmax(-1)
                    drafts = rows if map_ is None else map_[rows]
                    hits[:count, step] = (drafts == text[step + 1 :]).cpu()
            found[name] = hits
        results.append(found)
    return results


def measure(
    model: Model,
    samples: Iterable[dict],
    num_steps: int,
    token_maps: dict[str, Tensor | None] | None = None,
    batch_tokens: int = 8192,
) -> dict[tuple[str, str, str], Acceptance]:
    """{(source, lang, map name): Acceptance} over distilled samples (`prompt_ids`, `output_ids`); "full" is no map."""
    maps = {FULL: None} | (token_maps or {})
    samples = sorted(samples, key=lambda s: len(s["prompt_ids"]) + len(s["output_ids"]))
    results: dict[tuple[str, str, str], Acceptance] = defaultdict(Acceptance)
    with tqdm(total=len(samples), desc="acceptance", unit="sample") as bar:
        while samples:
            longest = len(samples[-1]["prompt_ids"]) + len(samples[-1]["output_ids"])
            batch = samples[-max(1, batch_tokens // longest) :]
            del samples[-len(batch) :]
            pairs = [(s["prompt_ids"], s["output_ids"]) for s in batch]
            for sample, found in zip(batch, draft_hits(model, pairs, num_steps, maps), strict=True):
                for name, hits in found.items():
                    key = (sample.get("source", ""), sample.get("lang", ""), name)
                    results[key].add(len(sample["output_ids"]), walk(hits))
            bar.update(len(batch))
    return dict(results)


def pooled(results: dict[tuple[str, str, str], Acceptance], name: str = FULL) -> Acceptance:
    """All sources and languages of one map together."""
    total = Acceptance()
    for (_, _, map_), part in results.items():
        if map_ == name:
            total.add(part.output_tokens, part.histogram)
    return total


def read_samples(path: str | Path, vocab_size: int, limit: int | None = None) -> list[dict]:
    """Distilled samples of a jsonl file. InputError names the line that lacks ids or has one outside the vocabulary."""
    samples = []
    for number, row in files.read_jsonl(path):
        for key in ("prompt_ids", "output_ids"):
            if not isinstance(row.get(key), list) or not row[key]:
                raise InputError(f"{path}:{number}: no `{key}`; give distilled samples (python -m fastmtp.distill)")
            if not all(isinstance(t, int) and 0 <= t < vocab_size for t in row[key]):
                raise InputError(
                    f"{path}:{number}: `{key}` has ids outside the model's {vocab_size} tokens; distil with this model"
                )
        samples.append(row)
    if not samples:
        raise InputError(f"{path}: no samples; check the file")
    return samples[:limit]


def table(results: dict[tuple[str, str, str], Acceptance]) -> str:
    """Markdown: tau and position rates per source, language and map, then pooled."""
    names = list(dict.fromkeys(name for _, _, name in results))
    steps = len(next(iter(results.values())).histogram) - 1
    lines = ["| source | lang | map | tokens | tau | " + " | ".join(f"draft {i + 1}" for i in range(steps)) + " |"]
    lines.append("|---|---|---|---:|---:|" + "---:|" * steps)
    rows = sorted(results.items(), key=lambda row: (*row[0][:2], names.index(row[0][2])))
    for (source, lang, name), part in [*rows, *((("all", "", n), pooled(results, n)) for n in names)]:
        rates = " | ".join(f"{rate:.3f}" for rate in part.position_rates)
        lines.append(f"| {source} | {lang} | {name} | {part.output_tokens} | {part.accept_length:.3f} | {rates} |")
    return "\n".join(lines)


def as_json(results: dict[tuple[str, str, str], Acceptance], head: str) -> list[dict]:
    """One object a row of `table` (pooled rows left out)."""
    return [
        {
            "head": head,
            **dict(zip(("source", "lang", "map"), key, strict=True)),
            "output_tokens": part.output_tokens,
            "verify_passes": part.verify_passes,
            "histogram": part.histogram,
            "accept_length": part.accept_length,
            "position_rates": part.position_rates,
        }
        for key, part in sorted(results.items())
    ]


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.acceptance",
        "Accept length and per-position rates of a head on finished answers, from one teacher-forced pass.",
        "python -m fastmtp.acceptance --model models/smollm2-fastmtp --data data/heldout.jsonl \\\n"
        "    --num-steps 3 --token-map vocab/smollm2/en_8k.pt --token-map vocab/smollm2/en_16k.pt",
    )
    p.add_argument("--model", required=True, help="model folder")
    p.add_argument(
        "--head", action="append", help="a checkpoint or shipped head instead of the model's own; may be repeated"
    )
    p.add_argument("--data", required=True, help="distilled samples (greedy ones predict greedy decoding)")
    p.add_argument("--limit", type=int, help="use only the first N samples")
    p.add_argument("--num-steps", type=int, default=3, help="drafts a cycle, K (default 3)")
    p.add_argument("--token-map", action="append", default=[], help="also with this map (.pt); may be repeated")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", help="also write the figures as JSON")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.num_steps < 1:
        raise InputError(f"--num-steps must be at least 1, not {args.num_steps}")
    heads = {name: read_head(name) for name in args.head or [args.model]}
    model = load(args.model, args.dtype, args.device)
    maps = {Path(path).stem: load_token_map(path, model.net.vocab_size) for path in args.token_map}
    samples = read_samples(args.data, model.net.vocab_size, args.limit)
    rows, tables = [], []
    for name, head in heads.items():
        model.net.load_head(head)
        results = measure(model, samples, args.num_steps, maps)
        rows += as_json(results, name)
        tables.append(f"head: {name}\n\n{table(results)}\n")
    if args.out:
        files.write_json(args.out, {"num_steps": args.num_steps, "rows": rows})
        files.write_provenance(args.out, vars(args), [args.data, *args.token_map])
    print("\n".join(tables))


if __name__ == "__main__":
    run(main)
