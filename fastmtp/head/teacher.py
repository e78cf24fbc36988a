"""The backbone's own next-token distributions as labels, and the loss of a draft distribution against them.

The backbone's state at position j holds its distribution of token j+1 for nothing but a product with lm_head.
It is kept as the `top_k` likeliest ids, their probabilities, and what is left in one tail bucket; so one pass
over it serves all K steps, and no [tokens, vocabulary] outlives its chunk. The loss is KL(p || q) of the
buckets, p the backbone's and q the draft's: cross-entropy less p's entropy, so plain cross-entropy if all
mass is on one id.

Imports torch alone (and `row_loss`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .row_loss import normalise, scaled_softmax

CHUNK_BYTES = 32 * 2**20  # what a CPU's cache holds
GPU_CHUNKS = 64  # a GPU's products want some thousand rows
TINY = 1e-30
# 1 minus a sum is no more exact than this, and its inverse scales the gradient of every token in the tail.
TAIL = 1e-6


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of hidden's rows whose float32 logits stay below CHUNK_BYTES, GPU_CHUNKS times that on a GPU
    (one row at least).
    """
    size = max(1, CHUNK_BYTES * (GPU_CHUNKS if hidden.is_cuda else 1) // (4 * weight.shape[0]))
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


@torch.no_grad()
def greedy(hidden: Tensor, weight: Tensor) -> Tensor:
    """argmax of hidden @ weight.T, [N] int64. hidden: [N, H]; weight: [V, H]."""
    ids = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    for part in chunks(hidden, weight):
        ids[part] = F.linear(hidden[part].to(weight.dtype), weight).argmax(-1)
    return ids


@torch.no_grad()
def likeliest(hidden: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` likeliest ids of each row and their probabilities: [N, k] int64, [N, k] float32.

    hidden: [N, H] backbone states after the final norm; weight: [V, H]; k = min(top_k, V).
    """
    k = min(top_k, weight.shape[0])
    ids = torch.empty(hidden.shape[0], k, dtype=torch.int64, device=hidden.device)
    probs = torch.empty(hidden.shape[0], k, dtype=torch.float32, device=hidden.device)
    for part in chunks(hidden, weight):
        logits = F.linear(hidden[part].to(weight.dtype), weight)
        values, ids[part] = logits.topk(k)
        probs[part] = (values.float() - logits.float().logsumexp(-1, keepdim=True)).exp()
    return ids, probs


class _SoftCrossEntropy(torch.autograd.Function):
    """As losses._ChunkedCrossEntropy: the gradient of a row is ready when its logits are, so it is kept in
    their stead.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        drafts = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        grad = torch.empty_like(hidden) if hidden.requires_grad else None
        for part in chunks(hidden, weight):
            logits = F.linear(hidden[part].to(weight.dtype), weight)
            normaliser, drafts[part] = normalise(logits)
            part_ids = ids[part]
            shares = (logits.gather(1, part_ids).float() - normaliser[:, None]).exp()
            p, q = with_tail(probs[part], 0.0), with_tail(shares.clamp(min=TINY), TAIL)
            losses[part] = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
            if grad is not None:
                slopes = 1 - p / q  # dL/dz_v is q_v times the slope of v's bucket; z: the draft's logits
                pulls = (q * slopes).to(weight.dtype)
                # the tail's slope for all, then the top k's own
                residual = scaled_softmax(logits, normaliser, slopes[:, -1].contiguous())
                residual.scatter_(1, part_ids, pulls[:, : part_ids.shape[1]])
                grad[part] = (residual @ weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(drafts)
        return losses, drafts

    @staticmethod
    def backward(ctx, upstream: Tensor, _):
        (grad,) = ctx.saved_tensors
        return grad * upstream[:, None].to(grad.dtype), None, None, None


def with_tail(x: Tensor, least: float) -> Tensor:
    """[N, k] -> [N, k + 1]: the mass outside, at least `least`, as a last bucket."""
    return torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp(min=least)], dim=-1)


def soft_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row against a distribution (see the module), and the draft's argmax: [N] float32, [N]
    int64.

    hidden: [N, H]; weight: [V, H], frozen (ValueError otherwise); ids, probs: [N, k], distinct ids and their
    probabilities, the rest is the tail.
    """
    if weight.requires_grad:
        raise ValueError("the output matrix must be frozen: FastMTP trains the MTP layer alone")
    with torch.autocast(hidden.device.type, enabled=False):
        return _SoftCrossEntropy.apply(hidden, weight, ids, probs)
