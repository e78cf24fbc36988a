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
from fastmtp.reference.teacher_forced import FULL, Results, collect, measure_tables, pooled
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


def text_ranks(
    hidden: Tensor, weight: Tensor, allowed: Tensor | None, text: Tensor, inside: Tensor
) -> Tensor:
    """[N] int32, see `teacher_forced.draft_tables`: the rank of the text's token (see trees/fit.py); MISS
    outside the map and behind the answer.
    """
    if allowed is not None:
        inside = inside & torch.isin(text, allowed)
        text = torch.searchsorted(allowed, text)
    ranks = torch.full(text.shape, MISS, dtype=torch.int32, device=text.device)
    ranks[inside] = rank(hidden[inside], weight, text[inside]).int()
    return ranks


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
    return measure_tables(
        model, samples, depth, text_ranks, "ranks of the text", token_maps, batch_tokens, vocab
    )


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
            between = markdown.interval(part.interval, ".3f")
            tau = markdown.number(part.accept_length, ".3f")
            kind = "static" if isinstance(tree, StaticTree) else f"dynamic, topk {tree.topk}"
            rows.append([name, kind, map_, tree.nodes, tree.depth, part.output_tokens, tau, between])
    return markdown.grid(["draft", "kind", "map", "nodes", "depth", "tokens", "tau", "95 %"], rows, text=3)
