"""Accept length of draft trees on finished answers.

Static trees from one teacher-forced pass: accepted drafts equal the text, so the ranks of the text's own
tokens among the drafts of each step say what every static tree accepts (trees/fit.py). Dynamic trees depend
on the probabilities of tokens that are not in the text, so the head drafts them again at every anchor of the
walk, behind one pass of the backbone over the text.

    ranks = measure_ranks(model, samples, 5, {"en_8k": ids})
    acceptance(fit(ranks["en_8k"], nodes=16, depth=3), ranks["en_8k"])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtp.head.teacher import chunks
from fastmtp.reference.model import Model
from fastmtp.reference.speculative import Backbone, Drafter
from fastmtp.reference.teacher_forced import (
    FULL,
    Results,
    anchors_of,
    batches,
    collect,
    followed,
    most_places,
    pooled,
)
from fastmtp.show import markdown
from fastmtp.show.progress import Bar
from fastmtp.tau import stride
from fastmtp.trees.fit import MISS, accepted
from fastmtp.trees.tree import DraftTree, StaticTree, walk
from fastmtp.vocab.draft_vocab import AUTO, DraftVocab, names_by_anchor


def rank(hidden: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """How many rows of `weight` come before rows[i] in the order of hidden[i] @ weight.T; of equals the lower
    row is first. hidden: [N, H]; weight: [V, H]; rows: [N] int64. Returns [N] int64.
    """
    ranks = torch.empty_like(rows)
    numbers = torch.arange(weight.shape[0], device=rows.device)
    for part in chunks(hidden, weight):
        logits = F.linear(hidden[part].to(weight.dtype), weight)
        row = rows[part, None]
        own = logits.gather(1, row)
        ranks[part] = ((logits > own) | ((logits == own) & (numbers < row))).sum(-1)
    return ranks


@torch.inference_mode()
def draft_ranks(
    model: Model,
    pairs: Sequence[tuple[list[int], list[int]]],
    depth: int,
    token_maps: dict[str, Tensor | None],
) -> list[dict[str, Tensor]]:
    """For each of `pairs` (prompt ids, output ids): {map name: ranks [n-1, depth] int32} (see trees/fit.py),
    from one padded forward pass.
    """
    weight = model.net.lm_head.weight
    ids, mask, places, left = (x.to(weight.device) for x in anchors_of(pairs))
    _, states, _ = model.net.mtp_states(ids, mask, num_steps=depth, attention="exact")
    text = torch.cat([ids.flatten(), ids.new_zeros(depth + 1)])

    tables: list[dict[str, Tensor]] = [{} for _ in pairs]
    for name, token_map in token_maps.items():
        allowed = None if token_map is None else token_map.to(weight.device)
        small = weight if allowed is None else weight[allowed]
        ranks = torch.full((len(places), depth), MISS, dtype=torch.int32)
        for step, state in enumerate(states):
            # Only a token of the map, within the answer, has a rank.
            rows = text[places + step + 2]
            drafted = left > step
            if allowed is not None:
                drafted &= torch.isin(rows, allowed)
                rows = torch.searchsorted(allowed, rows)
            hidden = state.flatten(0, 1)[places[drafted]]
            ranks[drafted.cpu(), step] = rank(hidden, small, rows[drafted]).int().cpu()
        for by_map, part in zip(tables, ranks.split([len(output) - 1 for _, output in pairs]), strict=True):
            by_map[name] = part
    return tables


def measure_ranks(
    model: Model,
    samples: Sequence[dict],
    depth: int,
    token_maps: dict[str, Tensor | None] | None = None,
    batch_tokens: int | None = None,
    vocab: DraftVocab | None = None,
) -> dict[str, list[Tensor]]:
    """{map name: ranks [n-1, depth] of every sample, in order}; maps and `vocab` as in
    `teacher_forced.measure_at`, "full" included.
    """
    maps = {FULL: None} | (token_maps or {}) | (vocab.maps if vocab else {})
    tables: dict[int, dict[str, Tensor]] = {}
    with Bar(total=len(samples), desc="ranks of the text", unit="sample", leave=False) as bar:
        for batch in batches(samples, batch_tokens or most_places(model)):
            pairs = [(samples[i]["prompt_ids"], samples[i]["output_ids"]) for i in batch]
            for i, pair, by_map in zip(batch, pairs, draft_ranks(model, pairs, depth, maps), strict=True):
                if vocab:
                    by_map[AUTO] = followed(vocab, *pair, by_map)
                tables[i] = by_map
            bar.update(len(batch))
    return {name: [tables[i][name] for i in range(len(samples))] for name in tables[0]}


@torch.inference_mode()
def draft_along(
    model: Model, prompt: list[int], output: list[int], tree: DraftTree, maps: Sequence[Tensor | None]
) -> list[int]:
    """Histogram of accepted drafts of one answer, by drafting `tree` at each anchor of the walk.

    maps[i]: the token map that drafts what follows answer token i.
    """
    text, histogram = prompt + output, [0] * (tree.depth + 1)
    states, _ = Backbone(model.net).forward(text, 0, 1)
    drafter = Drafter(model.net, len(text) + tree.expanded, None)
    start, last = 0, len(prompt)  # tokens up to `last` are committed, the head has read those up to `start`
    while last < len(text) - 1:
        read = torch.tensor([text[start + 1 : last + 1]], device=states.device)
        state = drafter.step(states[:, start:last], read, start)
        drafter.use(maps[last - len(prompt)])
        drawing = drafter.draw(tree, state, last - 1, text[last])
        ahead = iter(text[last + 1 :])
        path, _ = walk(drawing.tokens, drawing.parents, lambda _, ahead=ahead: next(ahead, -1))
        histogram[len(path)] += 1
        start, last = last, last + len(path) + 1
    return histogram


def measure_drafted(
    model: Model,
    samples: Sequence[dict],
    tree: DraftTree,
    token_maps: dict[str, Tensor | None] | None = None,
    vocab: DraftVocab | None = None,
) -> dict[str, list[list[int]]]:
    """{map name: histogram of every sample}, by drafting; maps as in `measure_ranks`."""
    maps = {FULL: None} | (token_maps or {}) | (vocab.maps if vocab else {})
    histograms: dict[str, list[list[int]]] = {name: [] for name in [*maps, *([AUTO] if vocab else [])]}
    for sample in Bar(samples, desc=f"drafting ({tree})", unit="sample", leave=False):
        prompt, output = sample["prompt_ids"], sample["output_ids"]
        for name, rows in histograms.items():
            active = names_by_anchor(vocab, prompt, output) if name == AUTO else [name] * len(output)
            rows.append(draft_along(model, prompt, output, tree, [maps[here] for here in active]))
    return histograms


def measure_trees(
    model: Model,
    samples: Sequence[dict],
    trees: dict[str, DraftTree],
    ranks: dict[str, list[Tensor]],
    token_maps: dict[str, Tensor | None] | None = None,
    vocab: DraftVocab | None = None,
) -> dict[str, Results]:
    """Results (see `teacher_forced`) of each tree: static ones from `ranks`, which `measure_ranks` gave for
    these samples and maps, dynamic ones by drafting.
    """
    results = {}
    for name, tree in trees.items():
        if isinstance(tree, StaticTree):
            histograms = {
                map_: [stride(accepted(tree, table), tree.depth) for table in tables]
                for map_, tables in ranks.items()
            }
        else:
            histograms = measure_drafted(model, samples, tree, token_maps, vocab)
        results[name] = collect(samples, histograms)
    return results


def tree_table(results: dict[str, Results], trees: dict[str, DraftTree]) -> str:
    """Markdown: tau of each tree and map with its interval, all sources pooled."""
    rows = []
    for name, tree in trees.items():
        for map_ in dict.fromkeys(key[2] for key in results[name]):
            part = pooled(results[name], map_)
            between = "-" if part.interval is None else "{:.3f} to {:.3f}".format(*part.interval)
            tau = markdown.number(part.accept_length, ".3f")
            kind = "static" if isinstance(tree, StaticTree) else f"dynamic, topk {tree.topk}"
            rows.append([name, kind, map_, tree.nodes, tree.depth, part.output_tokens, tau, between])
    return markdown.grid(["draft", "kind", "map", "nodes", "depth", "tokens", "tau", "95 %"], rows, text=3)
