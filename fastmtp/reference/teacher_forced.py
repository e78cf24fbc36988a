"""Accept length without decoding, by one teacher-forced pass over finished answers.

Greedy drafts that were accepted equal the text, so the chain that an engine would draft at any anchor is the
chain over the text itself, up to its first miss. Computing all anchors at once in `exact` mode (recursion.py)
and walking the answer from one verify pass to the next gives what the decoder would have counted, for the
cost of one forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmtp.head.teacher import greedy
from fastmtp.reference.model import Model
from fastmtp.show import markdown
from fastmtp.show.progress import Bar
from fastmtp.tau import Acceptance, walk
from fastmtp.vocab.draft_vocab import AUTO, DraftVocab, names_by_anchor

FULL = "full"  # the name of no map
Results = dict[tuple[str, str, str], Acceptance]  # by source, language, map name
Pair = tuple[list[int], list[int]]  # prompt ids, output ids
Judge = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]  # see `draft_tables`


def anchors_of(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A padded batch: ids and mask [B, T], and of its N anchors the flat places and how many answer tokens
    follow the anchor's next token, both [N].
    """
    longest = max(len(prompt) + len(output) for prompt, output in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    places, left = [], []
    for row, (prompt, output) in enumerate(pairs):
        ids[row, : len(prompt) + len(output)] = torch.tensor(prompt + output)
        mask[row, : len(prompt) + len(output)] = 1
        start = row * longest + len(prompt) - 1  # the last token of the prompt is the first anchor
        places.append(torch.arange(start, start + len(output) - 1))
        left.append(torch.arange(len(output) - 1, 0, -1))
    return ids, mask, torch.cat(places), torch.cat(left)


@torch.inference_mode()
def draft_tables(
    model: Model, pairs: Sequence[Pair], num_steps: int, token_maps: dict[str, Tensor | None], judge: Judge
) -> list[dict[str, Tensor]]:
    """For each of `pairs`: {map name: table [n-1, K]}, from one padded forward pass.

    judge(hidden, weight, allowed, text, inside): one column of the table [N], from a step's states at the N
    anchors [N, H], the output rows that take part and their ids (None: all), the text's token at the draft's
    place [N], and whether that is within the answer [N] bool.
    """
    weight = model.net.lm_head.weight
    ids, mask, places, left = (x.to(weight.device) for x in anchors_of(pairs))
    _, states, _ = model.net.mtp_states(ids, mask, num_steps=num_steps, attention="exact")
    text = torch.cat([ids.flatten(), ids.new_zeros(num_steps + 1)])

    # Judge every anchor with every map; only the rows of the map take part.
    tables: list[dict[str, Tensor]] = [{} for _ in pairs]
    for name, token_map in token_maps.items():
        allowed = None if token_map is None else token_map.to(weight.device)
        small = weight if allowed is None else weight[allowed]
        columns = [
            judge(state.flatten(0, 1)[places], small, allowed, text[places + step + 2], left > step)
            for step, state in enumerate(states)
        ]

        # Back to one table per answer.
        parts = torch.stack(columns, 1).cpu().split([len(output) - 1 for _, output in pairs])
        for by_map, part in zip(tables, parts, strict=True):
            by_map[name] = part
    return tables


def hits(hidden: Tensor, weight: Tensor, allowed: Tensor | None, text: Tensor, inside: Tensor) -> Tensor:
    """[N] bool, see `draft_tables`: whether the best draft is the text's token."""
    rows = greedy(hidden, weight)
    return ((rows if allowed is None else allowed[rows]) == text) & inside


def batches(samples: Sequence[dict], batch_tokens: int) -> list[list[int]]:
    """Numbers of the samples, longest first, in batches of at most `batch_tokens` places with padding."""
    length = [len(sample["prompt_ids"]) + len(sample["output_ids"]) for sample in samples]
    order = sorted(range(len(samples)), key=length.__getitem__)
    result = []
    while order:
        size = max(1, batch_tokens // length[order[-1]])
        result.append(order[-size:])
        del order[-size:]
    return result


def most_places(model: Model) -> int:
    """Places of a batch, padding included, that suit the model's device."""
    return 32768 if model.net.lm_head.weight.is_cuda else 8192


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
    tables = measure_tables(model, samples, max(at), hits, "acceptance", token_maps, batch_tokens, vocab)
    return {
        steps: collect(
            samples, {name: [walk(right[:, :steps]) for right in rows] for name, rows in tables.items()}
        )
        for steps in at
    }


def measure_tables(
    model: Model,
    samples: Sequence[dict],
    num_steps: int,
    judge: Judge,
    title: str,
    token_maps: dict[str, Tensor | None] | None = None,
    batch_tokens: int | None = None,
    vocab: DraftVocab | None = None,
) -> dict[str, list[Tensor]]:
    """{map name: table [n-1, K] of every sample, in order} (see `draft_tables`); the other arguments as in
    `measure_at`. `title` is the progress bar's.
    """
    maps = {FULL: None} | (token_maps or {}) | (vocab.maps if vocab else {})
    tables: dict[int, dict[str, Tensor]] = {}
    with Bar(total=len(samples), desc=title, unit="sample", leave=False) as bar:
        for batch in batches(samples, batch_tokens or most_places(model)):
            pairs = [(samples[i]["prompt_ids"], samples[i]["output_ids"]) for i in batch]
            by_sample = draft_tables(model, pairs, num_steps, maps, judge)
            for i, pair, by_map in zip(batch, pairs, by_sample, strict=True):
                if vocab:
                    by_map[AUTO] = followed(vocab, *pair, by_map)
                tables[i] = by_map
            bar.update(len(batch))
    return {name: [tables[i][name] for i in range(len(samples))] for name in tables[0]}


def collect(samples: Sequence[dict], histograms: dict[str, list[list[int]]]) -> Results:
    """Each map's histograms of the samples, in the order of the data, so that the intervals of two heads are
    paired.
    """
    results: Results = defaultdict(Acceptance)
    for i, sample in enumerate(samples):
        for name, rows in histograms.items():
            key = (sample.get("source", ""), sample.get("lang", ""), name)
            results[key].add(len(sample["output_ids"]), rows[i])
    return dict(results)


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


def table(results: Results) -> str:
    """Markdown: tau with its interval, and position rates, per source, language and map, then pooled."""
    names = list(dict.fromkeys(name for _, _, name in results))
    steps = len(next(iter(results.values())).histogram) - 1
    keys = sorted(results, key=lambda key: (*key[:2], names.index(key[2])))
    parts = [(*key, results[key]) for key in keys] + [
        ("all", "", name, pooled(results, name)) for name in names
    ]
    rows = []
    for source, lang, name, part in parts:
        between = markdown.interval(part.interval, ".3f")
        rates = [markdown.number(rate, ".3f") for rate in part.position_rates or [None] * steps]
        tau = markdown.number(part.accept_length, ".3f")
        rows.append([source, lang, name, part.output_tokens, tau, between, *rates])
    drafts = [f"draft {i + 1}" for i in range(steps)]
    return markdown.grid(["source", "lang", "map", "tokens", "tau", "95 %", *drafts], rows, text=3)


def as_json(results: Results, head: str) -> list[dict]:
    """One object per row of `table` (pooled rows left out)."""
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
