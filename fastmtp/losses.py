"""Where each step has a target, what it weighs, and cross-entropy that never holds [tokens, vocabulary].

FastMTP (arXiv 2509.18362): L = sum_k alpha_k * CE_k with alpha_k proportional to beta^(k-1). Imports torch alone (and `recursion.shift`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .recursion import shift

IGNORE = -100
CHUNK_BYTES = 256 * 2**20


def step_weights(num_steps: int, beta: float) -> list[float]:
    """alpha_1..alpha_K, proportional to beta^(k-1), summing to 1. Raises ValueError for K < 1 or beta <= 0."""
    if num_steps < 1 or beta <= 0:
        raise ValueError(f"need num_steps >= 1 and beta > 0, not {num_steps} and {beta}")
    powers = [beta**k for k in range(num_steps)]
    return [power / sum(powers) for power in powers]


def step_targets(labels: Tensor, segments: Tensor, num_steps: int) -> list[Tensor]:
    """Targets of each step: K tensors [B, T] int64; at anchor p step k has x_{p+k+1}, or IGNORE.

    A target exists only where x_{p+1}, ..., x_{p+k+1} are all answer tokens of one turn of one document: the engine
    drafts after a token it has generated, so an anchor inside a prompt, or a chain that would cross into the next
    turn, is never served. labels: [B, T], IGNORE outside answers; segments: [B, T] as in `recursion.layout`.
    """
    answered = labels != IGNORE
    in_turn = shift(answered, 1, False) & (shift(segments, 1) == segments) & (segments > 0)
    targets = []
    for step in range(1, num_steps + 1):
        in_turn = in_turn & shift(answered, step + 1, False) & (shift(segments, step + 1) == segments)
        targets.append(torch.where(in_turn, shift(labels, step + 1, IGNORE), IGNORE))
    return targets


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Token losses and their gradient to the hidden states in one pass over chunks of rows.

    The output matrix is frozen, and row i of the gradient depends on row i alone, so the gradient is ready as soon
    as the chunk's logits are: nothing of size V outlives its chunk, and the backward pass is a row-wise product.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part].to(weight.dtype), weight).float()
            wanted = targets[part, None]
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses[part] = (normaliser - logits.gather(1, wanted)).squeeze(1)
            if grad is not None:
                residual = logits.sub_(normaliser).exp_()
                residual.scatter_add_(1, wanted, torch.full_like(normaliser, -1.0))
                grad[part] = (residual.to(weight.dtype) @ weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * upstream[:, None].to(grad.dtype), None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Per-token cross-entropy of logits = hidden @ weight.T. Returns [N] float32.

    hidden: [N, H]; weight: [V, H], frozen (ValueError otherwise: its gradient is not computed); targets: [N] int64.
    """
    if weight.requires_grad:
        raise ValueError("the output matrix must be frozen: FastMTP trains the MTP layer alone")
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets)


def mtp_loss(
    states: list[Tensor], weight: Tensor, labels: Tensor, segments: Tensor, beta: float, num_items: Tensor | int | None
) -> tuple[Tensor, list[Tensor]]:
    """Weighted loss (scalar) and the token losses of each step (K tensors [N_k], detached) for logging.

    states: K tensors [B, T, H] from `recursion.recurse`. Each target weighs alpha_k / N, N = `num_items` (answer
    tokens of the whole optimiser step, so that accumulation, packing and data parallelism change nothing), or the
    batch's own count when None.
    """
    if num_items is None:
        num_items = (labels[:, 1:] != IGNORE).sum().clamp(min=1)
    total = states[0].sum() * 0.0  # keeps the graph when a batch has no target at all
    token_losses = []
    weights = step_weights(len(states), beta)
    for alpha, state, target in zip(weights, states, step_targets(labels, segments, len(states)), strict=True):
        where = target != IGNORE
        losses = cross_entropy(state[where], weight, target[where])
        total = total + alpha * losses.sum() / num_items
        token_losses.append(losses.detach())
    return total, token_losses
