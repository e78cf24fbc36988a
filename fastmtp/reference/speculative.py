"""Speculative decoding with one MTP head, short enough to check by eye: lossless, CPU or GPU, one stream.

A cycle: the head drafts a chain of K tokens or a tree (trees/tree.py) from the last committed backbone state,
the backbone verifies all of it in one forward pass, the longest right path and one token of the backbone's
own are kept. Greedy decoding keeps the draft that equals the backbone's argmax. At a temperature a chain's
drafts are drawn, and the rule of Leviathan et al. (arXiv 2211.17192) accepts a draft x with probability
min(1, p(x)/q(x)) and otherwise samples from the residual; a tree's drafts are the head's likeliest, and those
that equal the backbone's own draws are kept (`tree.walk`). Both leave the backbone's distribution. The head's
keys of committed tokens always come from true backbone states (recursion.py, `exact`).

    generate(load("models/smollm2"), [1, 2, 3], max_new_tokens=64, drafts=3).ids
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from fastmtp.head.modeling_mimo import MiMoForCausalLM, attention_of
from fastmtp.reference.attention import ATTENTION
from fastmtp.reference.model import Model
from fastmtp.trees.tree import DraftTree, Drawing, chain_parents, depths, mask, walk
from fastmtp.vocab.draft_vocab import DraftVocab


@dataclass
class Generation:
    """One answer. ids: output tokens, the end token included; accepted[i]: accepted drafts that verify pass i
    kept, before one token of the backbone's own; histogram[j]: verify passes with j accepted drafts.
    """

    ids: list[int]
    verify_passes: int
    accepted: list[int]
    histogram: list[int]
    prefill_s: float
    decode_s: float


class Backbone:
    """The model that decides, with its key/value cache."""

    def __init__(self, net: MiMoForCausalLM):
        self.net, self.cache = net, DynamicCache(config=net.config)
        self.device = net.lm_head.weight.device

    def forward(
        self, ids: list[int], start: int, keep: int, parents: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read `ids` behind the `start` positions of the cache, the nodes of a tree if there are `parents`:
        what the head is fed with [1, n, H], last logits [keep, V].
        """
        seen, positions = None, range(start, start + len(ids))
        if parents and len(ids) > 1:  # each node sees the whole cache, its ancestors and itself
            seen = F.pad(mask(parents), (start, 0), value=True).to(self.device)
            positions = [start + depth for depth in depths(parents)]
        with attention_of(self.net.config, ATTENTION):
            hidden, fed = self.net.backbone(
                input_ids=torch.tensor([ids], device=self.device),
                attention_mask={"full_attention": seen},
                position_ids=torch.tensor([[*positions]], device=self.device),
                past_key_values=self.cache,
                use_cache=True,
            )
        return fed, self.net.lm_head(hidden[0, -keep:])

    def keep(self, path: list[int], count: int) -> None:
        """Of the last `count` positions keep those of `path`, moved together; the other drafts were
        rejected.
        """
        if path != [*range(len(path))]:
            for layer in self.cache.layers:
                for stored in (layer.keys, layer.values):
                    newest = stored[:, :, -count:]
                    newest[:, :, : len(path)] = newest[:, :, path]
        if len(path) < count:  # newer transformers count what to remove; older ones empty the cache at 0
            self.cache.crop(len(path) - count)


class Choice:
    """How a token is chosen from logits: the likeliest at temperature 0, else drawn."""

    def __init__(self, temperature: float, seed: int, device: torch.device):
        self.temperature = temperature
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def probabilities(self, logits: Tensor) -> Tensor:
        return (logits.float() / self.temperature).softmax(-1)

    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """logits [V'] -> (row, the distribution [V'] that it was drawn from; None if greedy)."""
        if not self.temperature:
            return logits.argmax(), None
        p = self.probabilities(logits)
        return torch.multinomial(p, 1, generator=self.generator)[0], p

    def verify(self, drawing: Drawing, q: Tensor | None, logits: Tensor) -> tuple[list[int], int]:
        """(accepted nodes, next token) from the backbone's logits of all nodes [n, V]; q: [n-1, V] as
        `Drafter.chain` gives.
        """
        if q is not None:
            accepted, extra = accept_sampled(
                drawing.tokens[1:], q, self.probabilities(logits), self.generator
            )
            return [*range(1, accepted + 1)], extra
        if not self.temperature:
            return walk(drawing.tokens, drawing.parents, logits.argmax(-1).tolist().__getitem__)
        return walk(drawing.tokens, drawing.parents, lambda node: int(self.pick(logits[node])[0]))


class Drafter:
    """The head with its own key/value cache; slot = position, so a draft's keys are overwritten once it is
    decided.
    """

    def __init__(self, net: MiMoForCausalLM, capacity: int, token_map: Tensor | None):
        head = net.head
        shape = (1, net.config.num_key_value_heads, capacity, head.self_attn.head_dim)
        weight = net.lm_head.weight
        self.net, self.head = net, head
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.source: Tensor | None = (
            None  # the map as it was handed over: a switch costs a copy, staying none
        )
        self.token_map, self.weight = None, weight
        self.use(token_map)

    def use(self, token_map: Tensor | None) -> None:
        """Draft from this map's ids [K] from now on; None: from all."""
        if token_map is not self.source:
            self.source = token_map
            self.token_map = token_map.to(self.weight.device)
            self.weight = self.net.lm_head.weight[self.token_map]

    def step(self, hidden: Tensor, tokens: Tensor, start: int) -> Tensor:
        """Run positions start..start+n-1 and keep their keys. hidden [1, n, H], tokens [1, n] -> last g [1,
        1, H].
        """
        n = tokens.shape[1]
        seen = torch.ones(n, start + n, dtype=torch.bool, device=tokens.device).tril(start)
        positions = torch.arange(start, start + n, device=tokens.device)[None]
        fused, context = self.attend(hidden, tokens, positions, seen if n > 1 else None, start + n)
        return self.head.finish(fused[:, -1:], context[:, :, -1:])

    def attend(
        self, hidden: Tensor, tokens: Tensor, positions: Tensor, seen: Tensor | None, end: int
    ) -> tuple[Tensor, Tensor]:
        """Put the keys of n tokens into the slots before `end`, and let each see the slots of its row of
        `seen` [n, end] bool, None: all. hidden [1, n, H]; tokens, positions [1, n] -> fused [1, n, H],
        context [1, Hq, n, D].
        """
        n = tokens.shape[1]
        embeds = self.net.model.embed_tokens(tokens)
        if end == n:
            embeds[:, 0] = 0  # as engines do: recursion.recurse
        fused = self.head.fuse(hidden, embeds)
        q, k, v = self.head.qkv(fused, *self.net.rope(positions))
        self.keys[:, :, end - n : end], self.values[:, :, end - n : end] = k, v
        context = F.scaled_dot_product_attention(
            q, self.keys[:, :, :end], self.values[:, :, :end], attn_mask=seen, enable_gqa=True
        )
        return fused, context

    def draw(self, tree: DraftTree, state: Tensor, position: int, root: int) -> Drawing:
        """`tree` behind the token `root`, from g at `position` [1, 1, H].

        The nodes that get children take the slots after `position` in turn; each sees the committed ones, its
        ancestors' and its own.
        """
        drawing, expanded, device = Drawing([root]), [], state.device
        seen = torch.ones(1, position + 1, dtype=torch.bool, device=device)
        for depth in range(tree.depth):
            if depth:  # the head runs on the frontier [F], from the states of its parents
                nodes = drawing.frontier
                parents = [expanded.index(drawing.parents[node]) for node in nodes]
                seen = torch.cat([seen[parents], torch.eye(len(nodes), dtype=torch.bool, device=device)], 1)
                tokens = torch.tensor([[drawing.tokens[node] for node in nodes]], device=device)
                positions = torch.full_like(tokens, position + depth)
                fused, context = self.attend(state[:, parents], tokens, positions, seen, seen.shape[1])
                state = self.head.finish(fused, context)
            expanded = drawing.frontier
            tree.grow(drawing, F.linear(state[0], self.weight), self.token_map)
        return tree.finish(drawing)

    def chain(
        self, state: Tensor, position: int, root: int, num_steps: int, choice: Choice
    ) -> tuple[Drawing, Tensor | None]:
        """K drafts behind the token `root`, from g at `position` [1, 1, H], and the distributions [K, V] of a
        temperature.
        """
        drafts, q = [], []
        for step in range(num_steps):
            if step:
                state = self.step(state, drafts[-1].view(1, 1), position + step)
            row, p = choice.pick(F.linear(state[0, -1], self.weight))
            drafts.append(row if self.token_map is None else self.token_map[row])
            if p is not None:  # over the whole vocabulary: outside the map nothing is ever drafted
                full = p if self.token_map is None else p.new_zeros(self.net.vocab_size)
                q.append(full if self.token_map is None else full.scatter_(0, self.token_map, p))
        tokens = [root, *torch.stack(drafts).tolist()]
        return Drawing(tokens, chain_parents(num_steps)), torch.stack(q) if q else None


def accept_sampled(drafts: list[int], q: Tensor, p: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """(accepted drafts, next token) by speculative sampling (arXiv 2211.17192, algorithm 1).

    q: [K, V] draft distributions; p: [K+1, V] the backbone's; the kept tokens are distributed as p alone.
    """
    for i, token in enumerate(drafts):
        u = torch.rand((), generator=generator, device=generator.device).item()
        if u * q[i, token].item() >= p[i, token].item():
            residual = (p[i] - q[i]).clamp(min=0)
            if not residual.any():  # p and q equal but for rounding
                residual = p[i]
            return i, int(torch.multinomial(residual, 1, generator=generator))
    return len(drafts), int(torch.multinomial(p[len(drafts)], 1, generator=generator))


@torch.inference_mode()
def generate(
    model: Model,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    drafts: int | DraftTree,
    temperature: float = 0.0,
    seed: int = 0,
    token_map: Tensor | DraftVocab | None = None,
    eos_ids: set[int] | None = None,
) -> Generation:
    """Decode one prompt with a chain of `drafts` tokens per cycle, or a tree of them; 0 is plain decoding,
    through the same code.

    Stops after a token of `eos_ids` (default: the model's) or at `max_new_tokens`. A DraftVocab as
    `token_map` chooses the map again before each cycle.
    """
    ends = model.eos_ids if eos_ids is None else eos_ids
    tokens, goal = list(prompt_ids), len(prompt_ids) + max_new_tokens
    backbone = Backbone(model.net)
    choice = Choice(temperature, seed, backbone.device)
    following = drafts != 0 and isinstance(token_map, DraftVocab)
    follower = token_map.follow(prompt_ids) if following else None
    depth, slots = (drafts, drafts) if isinstance(drafts, int) else (drafts.depth, drafts.expanded)
    drafter = Drafter(model.net, goal + slots + 1, None if follower else token_map) if depth else None

    # Prefill: the backbone reads the prompt and gives the first token; the head reads both.
    started = time.perf_counter()
    states, logits = backbone.forward(tokens, 0, 1)
    tokens.append(int(choice.pick(logits[0])[0]))
    if drafter:
        state = drafter.step(states, torch.tensor([tokens[1:]], device=backbone.device), 0)
    prefilled = time.perf_counter()

    accepted = []
    while tokens[-1] not in ends and len(tokens) < goal:
        # Draft after the newest token, which the backbone has not read yet.
        last, root = len(tokens) - 1, tokens[-1]
        if follower:
            drafter.use(token_map.maps[follower.look(tokens[len(prompt_ids) :])])
        drawing, q = Drawing([root]), None
        if drafter and isinstance(drafts, int):
            drawing, q = drafter.chain(state, last - 1, root, drafts, choice)
        elif drafter:
            drawing = drafter.draw(drafts, state, last - 1, root)

        # Verify all drafts in one pass; the rejected ones leave the cache.
        nodes = len(drawing.tokens)
        states, logits = backbone.forward(drawing.tokens, last, nodes, drawing.parents)
        path, extra = choice.verify(drawing, q, logits)
        backbone.keep([0, *path], nodes)

        # Keep what comes before the end token and the limit.
        new = [*(drawing.tokens[node] for node in path), extra]
        stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        kept = new[: min(stop, goal - len(tokens))]
        accepted.append(min(len(path), len(kept)))
        tokens += kept

        # The head's keys of kept tokens come from true states of the backbone.
        if drafter and len(kept) == len(new):
            read = torch.tensor([new], device=backbone.device)
            state = drafter.step(states[:, [0, *path]], read, last)
    decoded = time.perf_counter()
    output = tokens[len(prompt_ids) :]
    histogram = [accepted.count(count) for count in range(depth + 1)]
    seconds = prefilled - started, decoded - prefilled
    return Generation(output, len(accepted), accepted, histogram, *seconds)
