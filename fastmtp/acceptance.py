"""Accept length (tau) and per-position rates without decoding: one teacher-forced pass over finished answers.

Greedy drafts that were accepted equal the text, so the chain that an engine would draft at any anchor is the
chain over the text itself, up to its first miss. Computing all anchors at once in `exact` mode (recursion.py)
and walking the answer from one verify pass to the next gives what the decoder would have counted, for the
cost of one forward.

    python -m fastmtp.acceptance --model models/smollm2 --data heldout.jsonl --num-steps 7 --at 1,3,5 --token-map vocab/smollm2/en_8k.pt
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastmtp import files
from fastmtp.chat import IGNORE, encode_chat
from fastmtp.checkpoint import read_head
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.decoding import Model, load
from fastmtp.head.teacher import greedy
from fastmtp.tau import Acceptance, walk
from fastmtp.vocab.draft_vocab import AUTO, UNION, DraftVocab, names_by_anchor, parse_maps, union
from fastmtp.vocab.draft_vocab import read as read_vocab
from fastmtp.vocab.token_map import load_token_map

FULL = "full"  # the name of no map

Results = dict[tuple[str, str, str], "Acceptance"]  # by source, language, map name


@torch.inference_mode()
def draft_hits(
    model: Model,
    samples: list[tuple[list[int], list[int]]],
    num_steps: int,
    token_maps: dict[str, Tensor | None],
) -> list[dict[str, Tensor]]:
    """For each (prompt ids, output ids): {map name: hits [n-1, K]} (see `walk`), from one padded forward
    pass.
    """
    net = model.net
    weight = net.lm_head.weight
    longest = max(len(p) + len(o) for p, o in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    anchors, left = (
        [],
        [],
    )  # flat positions of all anchors, and how many answer tokens follow the anchor's next token
    for row, (prompt, output) in enumerate(samples):
        ids[row, : len(prompt) + len(output)] = torch.tensor(prompt + output)
        mask[row, : len(prompt) + len(output)] = 1
        start = row * longest + len(prompt) - 1
        anchors.append(torch.arange(start, start + len(output) - 1))
        left.append(torch.arange(len(output) - 1, 0, -1))
    ids, mask, where, left = (x.to(weight.device) for x in (ids, mask, torch.cat(anchors), torch.cat(left)))
    _, states, _ = net.mtp_states(ids, mask, num_steps=num_steps, attention="exact")
    text = torch.cat([ids.flatten(), ids.new_zeros(num_steps + 1)])
    results: list[dict[str, Tensor]] = [{} for _ in samples]
    for name, map_ in token_maps.items():
        small = weight if map_ is None else weight[map_.to(weight.device)]
        hits = torch.empty(len(where), num_steps, dtype=torch.bool, device=weight.device)
        for step, state in enumerate(states):
            rows = greedy(state.flatten(0, 1)[where], small)
            drafts = rows if map_ is None else map_.to(weight.device)[rows]
            hits[:, step] = (drafts == text[where + step + 2]) & (left > step)
        for found, part in zip(results, hits.cpu().split([len(a) for a in anchors]), strict=True):
            found[name] = part
    return results


def measure_at(
    model: Model,
    samples: Sequence[dict],
    at: Sequence[int],
    token_maps: dict[str, Tensor | None] | None = None,
    batch_tokens: int | None = None,
    vocab: DraftVocab | None = None,
) -> dict[int, Results]:
    """{K: {(source, lang, map name): Acceptance}} for every K of `at`, from one pass with the largest.

    samples: distilled ones (`prompt_ids`, `output_ids`); the map "full" is none. A batch holds at most
    `batch_tokens` places (default by device), padding included. `vocab` adds each of its maps, and "auto",
    which follows the language.
    """
    maps = {FULL: None} | (token_maps or {}) | (vocab.maps if vocab else {})
    batch_tokens = batch_tokens or (32768 if model.net.lm_head.weight.is_cuda else 8192)
    order = sorted(
        range(len(samples)), key=lambda i: len(samples[i]["prompt_ids"]) + len(samples[i]["output_ids"])
    )
    hits: dict[int, dict[str, Tensor]] = {}
    with tqdm(total=len(samples), desc="acceptance", unit="sample", leave=False) as bar:
        while order:
            longest = len(samples[order[-1]]["prompt_ids"]) + len(samples[order[-1]]["output_ids"])
            batch = order[-max(1, batch_tokens // longest) :]
            del order[-len(batch) :]
            pairs = [(samples[i]["prompt_ids"], samples[i]["output_ids"]) for i in batch]
            found = draft_hits(model, pairs, max(at), maps)
            if vocab:
                for (prompt, output), by_map in zip(pairs, found, strict=True):
                    by_map[AUTO] = followed(vocab, prompt, output, by_map)
            hits |= zip(batch, found, strict=True)
            bar.update(len(batch))
    results: dict[int, Results] = {steps: defaultdict(Acceptance) for steps in at}
    for i, sample in enumerate(samples):
        for name, found in hits[i].items():
            for steps in at:
                key = (sample.get("source", ""), sample.get("lang", ""), name)
                results[steps][key].add(len(sample["output_ids"]), walk(found[:, :steps]))
    return {steps: dict(rows) for steps, rows in results.items()}


def followed(vocab: DraftVocab, prompt: list[int], output: list[int], hits: dict[str, Tensor]) -> Tensor:
    """One answer's hits [n-1, K] with the map that is active at each anchor. hits: by map name."""
    active = names_by_anchor(vocab, prompt, output)
    rows = [hits[name][anchor] for anchor, name in enumerate(active)]
    return torch.stack(rows) if rows else hits[vocab.first()]


def measure(
    model: Model,
    samples: Sequence[dict],
    num_steps: int,
    token_maps: dict[str, Tensor | None] | None = None,
    batch_tokens: int | None = None,
) -> Results:
    """`measure_at` for one K."""
    return measure_at(model, samples, [num_steps], token_maps, batch_tokens)[num_steps]


def pooled(results: Results, name: str = FULL) -> Acceptance:
    """All sources and languages of one map together."""
    total = Acceptance()
    for (_, _, map_), part in results.items():
        if map_ == name:
            total.merge(part)
    return total


def read_samples(path: str | Path, vocab_size: int, limit: int | None = None, tokenizer=None) -> list[dict]:
    """Distilled samples of a jsonl file, or with a `tokenizer` curated rows too, whose last answer is then
    the output.

    InputError names the line that lacks ids or has one outside the vocabulary.
    """
    samples = []
    for number, row in files.read_jsonl(path):
        messages = row.get("messages") or []
        if (
            tokenizer is not None
            and "output_ids" not in row
            and any(m.get("role") == "assistant" for m in messages)
        ):
            row = {**row, **last_answer(tokenizer, messages)}
        for key in ("prompt_ids", "output_ids"):
            if not isinstance(row.get(key), list) or not row[key]:
                raise InputError(
                    f"{path}:{number}: no `{key}`; give distilled samples (python -m fastmtp.distill)"
                )
            if not all(isinstance(t, int) and 0 <= t < vocab_size for t in row[key]):
                raise InputError(
                    f"{path}:{number}: `{key}` has ids outside the model's {vocab_size} tokens; distil with this model"
                )
        samples.append(row)
        if len(samples) == limit:
            break
    if not samples:
        raise InputError(f"{path}: no samples; check the file")
    return samples


def last_answer(tokenizer, messages: list[dict]) -> dict[str, list[int]]:
    """`prompt_ids` and `output_ids` of a chat's last turn; the ids that training would see."""
    ids, labels = encode_chat(tokenizer, messages)
    start = max((i + 1 for i, label in enumerate(labels) if label == IGNORE), default=0)
    return {"prompt_ids": ids[:start], "output_ids": ids[start:]}


def table(results: Results) -> str:
    """Markdown: tau with its interval, and position rates, per source, language and map, then pooled."""
    names = list(dict.fromkeys(name for _, _, name in results))
    steps = len(next(iter(results.values())).histogram) - 1
    lines = [
        "| source | lang | map | tokens | tau | 95 % | "
        + " | ".join(f"draft {i + 1}" for i in range(steps))
        + " |"
    ]
    lines.append("|---|---|---|---:|---:|---:|" + "---:|" * steps)
    rows = sorted(results.items(), key=lambda row: (*row[0][:2], names.index(row[0][2])))
    for (source, lang, name), part in [*rows, *((("all", "", n), pooled(results, n)) for n in names)]:
        rates = " | ".join(f"{rate:.3f}" for rate in part.position_rates)
        low, high = part.interval
        lines.append(
            f"| {source} | {lang} | {name} | {part.output_tokens} | {part.accept_length:.3f} | {low:.3f} to {high:.3f} | {rates} |"
        )
    return "\n".join(lines)


def as_json(results: Results, head: str) -> list[dict]:
    """One object a row of `table` (pooled rows left out)."""
    return [
        {
            "head": head,
            **dict(zip(("source", "lang", "map"), key, strict=True)),
            "output_tokens": part.output_tokens,
            "verify_passes": part.verify_passes,
            "histogram": part.histogram,
            "accept_length": part.accept_length,
            "interval": part.interval,
            "position_rates": part.position_rates,
        }
        for key, part in sorted(results.items())
    ]


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.acceptance",
        "Accept length and per-position rates of a head on finished answers, from one teacher-forced pass.",
        "python -m fastmtp.acceptance --model models/smollm2-fastmtp --data data/heldout.jsonl \\\n"
        "    --num-steps 7 --at 1,3,5 --token-map vocab/smollm2/en_8k.pt --token-map vocab/smollm2/en_16k.pt",
    )
    p.add_argument("--model", required=True, help="model folder")
    p.add_argument(
        "--head",
        action="append",
        help="a checkpoint or shipped head instead of the model's own; may be repeated",
    )
    p.add_argument(
        "--data", required=True, help="distilled or curated samples (greedy ones predict greedy decoding)"
    )
    p.add_argument("--limit", type=int, help="use only the first N samples")
    p.add_argument("--num-steps", type=int, default=3, help="drafts a cycle, K (default 3)")
    p.add_argument("--at", help="tau for these smaller K too, from the same pass, such as 1,3,5")
    p.add_argument(
        "--token-map", action="append", default=[], help="also with this map (.pt); may be repeated"
    )
    p.add_argument(
        "--token-maps",
        metavar="EN=PATH,ZH=PATH",
        help="also with each of these, their mix, their union, and following the language",
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", help="also write the figures as JSON")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "num_steps")
    at = sorted({args.num_steps, *whole_numbers(args.at or "")})
    if at[0] < 1 or at[-1] > args.num_steps:
        raise InputError(f"--at must lie between 1 and --num-steps {args.num_steps}, not {args.at}")
    heads = {name: read_head(name) for name in args.head or [args.model]}
    model = load(args.model, args.dtype, args.device)
    maps = {Path(path).stem: load_token_map(path, model.net.vocab_size) for path in args.token_map}
    vocab = None
    if args.token_maps:
        vocab = read_vocab(args.token_maps, AUTO, model.tokenizer, model.net.vocab_size)
        maps[UNION] = union(vocab.maps)
    samples = read_samples(args.data, model.net.vocab_size, args.limit, model.tokenizer)
    rows, tables = {steps: [] for steps in at}, []
    for name, head in heads.items():
        model.net.load_head(head)
        for steps, results in measure_at(model, samples, at, maps, None, vocab).items():
            rows[steps] += as_json(results, name)
            tables.append(f"head: {name}, K={steps}\n\n{table(results)}\n")
    if args.out:
        largest = rows.pop(args.num_steps)
        files.write_json(args.out, {"num_steps": args.num_steps, "rows": largest, "at": rows})
        given = [*args.token_map, *(parse_maps(args.token_maps).values() if args.token_maps else [])]
        files.write_provenance(args.out, vars(args), [args.data, *given])
    print("\n".join(tables))


def whole_numbers(text: str) -> list[int]:
    """ "1,3,5" -> [1, 3, 5]. InputError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise InputError(f"--at {text}: no list of whole numbers such as 1,3,5") from None


if __name__ == "__main__":
    run(main)
