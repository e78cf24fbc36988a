"""The K recursive steps of one shared MTP layer, over whole sequences, as pure functions.

Notation: B batch, T tokens, H hidden, K steps, D head width. Anchor p (a position) drafts x_{p+2}, ...,
x_{p+K+1} from the backbone's final hidden state h_p and the known tokens x_{p+1}, ..., x_{p+K} (teacher
forcing):

    step 1:    u = fuse(h_p,        Emb(x_{p+1})),  RoPE position p,      g^1_p predicts x_{p+2}
    step k>1:  u = fuse(g^{k-1}_p,  Emb(x_{p+k})),  RoPE position p+k-1,  g^k_p predicts x_{p+k+1}

What the step-k query of anchor p may see is the one choice, `attention`:

    paper   the step-k keys of all positions <= p (FastMTP, arXiv 2509.18362, section 2.1): one causal pass
            per step
    exact   the step-1 keys of positions <= p and its own chain of steps 2..k. This is what an engine
            computes while it drafts: committed keys come from true hidden states, only the tokens in flight
            are recursive

Both agree at step 1. On a GPU in half precision no T x T matrix exists (varlen.py); elsewhere attention is
written out here, which is what the kernels are tested against. Imports torch alone (and `varlen`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .varlen import Documents, packed_attention

ATTENTIONS = ("paper", "exact")


class Head(Protocol):
    """The MTP layer cut at its attention, so that each mode and each cache can supply its own."""

    def fuse(self, hidden: Tensor, embeds: Tensor) -> Tensor: ...
    def qkv(self, fused: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def finish(self, fused: Tensor, context: Tensor) -> Tensor: ...


def shift(x: Tensor, k: int, fill: int | float = 0) -> Tensor:
    """y[:, p] = x[:, p + k], `fill` past the end. x: [B, T, ...]."""
    y = torch.full_like(x, fill)
    if k < x.shape[1]:
        y[:, : x.shape[1] - k] = x[:, k:]
    return y


def layout(
    shape: tuple[int, int], device: torch.device, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(positions [B, T], segments [B, T]), both int64; segment 0 is padding, documents count from 1.

    `attention_mask` [B, T] marks padding with 0; in a packed batch `position_ids` restart at 0 with each
    document.
    """
    if attention_mask is not None:
        segments = attention_mask.to(torch.int64)
        return (segments.cumsum(1) - 1).clamp(min=0), segments
    if position_ids is None:
        positions = torch.arange(shape[1], device=device).expand(shape)
        return positions, torch.ones_like(positions)
    positions = position_ids.expand(shape)
    return positions, (positions == 0).cumsum(1)


def visible(segments: Tensor) -> Tensor | None:
    """[B, 1, T, T] bool: query i may see key j <= i of its own document. None: plain causal, all one
    document.

    A padding query sees itself, because a softmax over nothing is NaN.
    """
    if bool((segments == 1).all()):
        return None
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    eye = torch.eye(length, dtype=torch.bool, device=segments.device)
    return (causal & ((same & (segments > 0)[:, None, :]) | eye))[:, None]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Ordinary causal attention. q: [B, Hq, T, D]; k, v: [B, Hkv, T, D]; returns [B, Hq, T, D]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def chain_attention(
    q: Tensor, k1: Tensor, v1: Tensor, chain: list[tuple[Tensor, Tensor]], mask: Tensor | None
) -> Tensor:
    """`exact` attention of step k: one softmax over [step-1 keys j <= i ; own keys of steps 2..k].

    q: [B, Hq, T, D]; k1, v1 and each (k, v) of `chain`: [B, Hkv, T, D]; returns [B, Hq, T, D].
    """
    batch, heads, length, width = q.shape
    groups = k1.shape[1]
    grouped = q.view(batch, groups, heads // groups, length, width) * width**-0.5
    scores = grouped @ k1[:, :, None].transpose(-1, -2)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None, None]
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    own = [(grouped * k[:, :, None]).sum(-1, keepdim=True) for k, _ in chain]
    weights = torch.cat([scores, *own], dim=-1).softmax(-1, dtype=torch.float32).to(v1.dtype)
    context = weights[..., :length] @ v1[:, :, None]
    for s, (_, v) in enumerate(chain):
        context = context + weights[..., length + s : length + s + 1] * v[:, :, None]
    return context.reshape(batch, heads, length, width)


def recurse(
    head: Head,
    rope: Callable[[Tensor], tuple[Tensor, Tensor]],
    hidden: Tensor,
    embeds: Tensor,
    positions: Tensor,
    segments: Tensor,
    num_steps: int,
    attention: str,
    where: Documents | None = None,
    recompute: bool = False,
) -> list[Tensor]:
    """Run K steps for every anchor at once; returns [g^1, ..., g^K], each [B, T, H] (after the final norm).

    hidden: [B, T, H] backbone output after its final norm; embeds: [B, T, H] token embeddings of x;
    rope: positions [B, T] -> (cos, sin), each [B, T, D]; positions, segments: see `layout`; where: the
    documents in `segments`, if the flash kernels shall be used (varlen.flash_usable); recompute: keep of each
    step only what attention takes and gives, and compute the rest again in the backward pass (half the
    memory, a tenth more time at 7B). g^k_p is meaningful only where p..p+k lie in one document. Raises
    ValueError on an unknown mode or K < 1.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {ATTENTIONS}, not {attention!r}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    mask = visible(segments) if where is None else None
    outputs: list[Tensor] = []
    first: tuple[Tensor, Tensor] | None = None
    chain: list[tuple[Tensor, Tensor]] = []
    state = hidden
    for step in range(1, num_steps + 1):
        at = positions + (step - 1)
        # engines zero the embedding at position 0 (h_0 with x_1), and only there
        tokens = shift(embeds, step) * (at != 0)[..., None].to(embeds.dtype)
        fused, q, k, v = maybe_again(recompute, _enter, head, state, tokens, *rope(at))
        if step == 1 or attention == "paper":
            first, chain = (k, v), []
        else:
            chain.append((k, v))
        if where is not None:
            context = packed_attention(q, *first, chain, where)
        elif chain:
            context = chain_attention(q, *first, chain, mask)
        else:
            context = causal_attention(q, *first, mask)
        state = maybe_again(recompute, head.finish, fused, context)
        outputs.append(state)
    return outputs


def _enter(head: Head, state: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    fused = head.fuse(state, tokens)
    return fused, *head.qkv(fused, cos, sin)


def maybe_again(recompute: bool, function: Callable, *inputs):
    """`function(*inputs)`; with `recompute` its intermediate results are not kept for the backward pass."""
    return (
        checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else function(*inputs)
    )
