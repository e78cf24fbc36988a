"""What the head is trained for: targets and weights of each step, and cross-entropy that never holds [tokens,
vocabulary].

FastMTP (arXiv 2509.18362): L = sum_k alpha_k * CE_k with alpha_k proportional to beta^(k-1), labels from the
text. Each part of that can be chosen (`Objective`). Imports torch alone (and `recursion`, `row_loss`,
`teacher`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .recursion import shift
from .row_loss import normalise, scaled_softmax
from .teacher import chunks, greedy, likeliest, soft_cross_entropy

IGNORE = -100
LABELS = ("data", "argmax", "kl")


@dataclass(frozen=True)
class Objective:
    """What is learnt at each step. Defaults: modeling_mimo.MiMoConfig. ValueError for a setting out of range.

    beta: step k weighs alpha_k, proportional to beta^(k-1).
    labels: `data`, the text's next token; `argmax`, the backbone's likeliest; `kl`, its distribution
        (teacher.py) as the `top_k` likeliest tokens and a tail.
    prefix_floor: where an earlier draft of the chain missed the text, an engine never gets to step k; such a
    target
        weighs this share. 1 keeps all alike, 0 drops them.
    """

    beta: float
    labels: str
    top_k: int
    prefix_floor: float

    def __post_init__(self):
        for name, value, fine, wanted in (
            ("beta", self.beta, _number(self.beta) and self.beta > 0, "a number above 0"),
            ("labels", self.labels, self.labels in LABELS, f"one of {', '.join(LABELS)}"),
            (
                "top_k",
                self.top_k,
                isinstance(self.top_k, int) and self.top_k > 0,
                "a whole number of at least 1",
            ),
            (
                "prefix_floor",
                self.prefix_floor,
                _number(self.prefix_floor) and 0 <= self.prefix_floor <= 1,
                "a number from 0 to 1",
            ),
        ):
            if not fine:
                raise ValueError(f"mtp_{name} must be {wanted}, not {value}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def step_weights(num_steps: int, beta: float) -> list[float]:
    """alpha_1..alpha_K, proportional to beta^(k-1), summing to 1. ValueError for K < 1 or beta <= 0."""
    if num_steps < 1 or beta <= 0:
        raise ValueError(f"need num_steps >= 1 and beta > 0, not {num_steps} and {beta}")
    powers = [beta**k for k in range(num_steps)]
    return [power / sum(powers) for power in powers]


def step_targets(labels: Tensor, segments: Tensor, num_steps: int) -> list[Tensor]:
    """Targets of each step: K tensors [B, T] int64; at anchor p step k has x_{p+k+1}, or IGNORE.

    A target exists only where x_{p+1}, ..., x_{p+k+1} are all answer tokens of one turn of one document: the
    engine drafts after a token it has generated, so an anchor inside a prompt, or a chain that would cross
    into the next turn, is never served. labels: [B, T], IGNORE outside answers; segments: [B, T] as in
    `recursion.layout`.
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

    The output matrix is frozen, and row i of the gradient depends on row i alone, so the gradient is ready as
    soon as the chunk's logits are: nothing of size V outlives its chunk, and the backward pass is a row-wise
    product.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if hidden.requires_grad else None
        for part in chunks(hidden, weight):
            logits = F.linear(hidden[part].to(weight.dtype), weight)
            target = targets[part, None]
            normaliser, _ = normalise(logits)
            chance = logits.gather(1, target).squeeze(1).float() - normaliser
            losses[part] = -chance
            if grad is not None:
                residual = scaled_softmax(logits, normaliser, torch.ones_like(normaliser))
                residual.scatter_(1, target, chance.expm1()[:, None].to(residual.dtype))
                grad[part] = (residual @ weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * upstream[:, None].to(grad.dtype), None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Per-token cross-entropy of logits = hidden @ weight.T. Returns [N] float32.

    hidden: [N, H]; weight: [V, H], frozen (ValueError otherwise: its gradient is not computed); targets: [N]
    int64.
    """
    if weight.requires_grad:
        raise ValueError("the output matrix must be frozen: FastMTP trains the MTP layer alone")
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets)


def mtp_loss(
    states: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    segments: Tensor,
    objective: Objective,
    num_items: Tensor | int | None,
) -> tuple[Tensor, list[Tensor]]:
    """Weighted loss (scalar) and the token losses of each step (K tensors [N_k], detached, unweighted) for
    logging.

    states: K tensors [B, T, H] from `recursion.recurse`; hidden: [B, T, H] the backbone's. Each target weighs
    alpha_k / N, N = `num_items` (answer tokens of the whole optimiser step, so that accumulation, packing and
    data parallelism change nothing), or the batch's own count when None; times what `objective` says.
    """
    if num_items is None:
        num_items = (labels[:, 1:] != IGNORE).sum().clamp(min=1)
    total = states[0].sum() * 0.0  # keeps the graph when a batch has no target at all
    token_losses = []
    weights = step_weights(len(states), objective.beta)
    targets = [target.flatten() for target in step_targets(labels, segments, len(states))]
    rows = [(target != IGNORE).nonzero().squeeze(1) for target in targets]
    answers = _Answers(hidden, weight, rows[0], objective) if objective.labels != "data" else None
    accepted = torch.ones_like(
        targets[0], dtype=torch.bool
    )  # by anchor: the chain's drafts so far equal the text
    for step, (alpha, state, target, where) in enumerate(zip(weights, states, targets, rows, strict=True), 1):
        picked, text = state.flatten(0, 1).index_select(0, where), target[where]
        if answers is None:
            ids, probs = text[:, None], None
        else:
            ids, probs = answers.at(where + step)
        if objective.prefix_floor == 1 and probs is None:
            losses = cross_entropy(picked, weight, ids.squeeze(1))
        else:
            probs = torch.ones_like(ids, dtype=torch.float32) if probs is None else probs
            losses, drafts = soft_cross_entropy(picked, weight, ids, probs)
        token_losses.append(losses.detach())
        if objective.prefix_floor != 1:
            losses = losses * torch.where(accepted[where], 1.0, objective.prefix_floor)
            accepted[where] &= drafts == text
        total = total + alpha * losses.sum() / num_items
    return total, token_losses


class _Answers:
    """What the backbone would say at each place of a target, computed once and shared by all steps.

    The backbone's state at flat position i predicts token i+1; step k of anchor p aims at token p+k+1, so
    reads row p+k. Targets of later steps lie among the places of step 1's.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, anchors: Tensor, objective: Objective):
        states = hidden.flatten(0, 1)
        self.row = torch.empty(states.shape[0], dtype=torch.int64, device=states.device)
        self.row[anchors + 1] = torch.arange(len(anchors), device=states.device)
        states = states[anchors + 1].detach()
        if objective.labels == "argmax":
            self.ids, self.probs = greedy(states, weight)[:, None], None
        else:
            self.ids, self.probs = likeliest(states, weight, objective.top_k)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """(ids [N, k], probabilities [N, k]) of the backbone at flat positions [N]; None if one id has it
        all.
        """
        rows = self.row[places]
        return self.ids[rows], None if self.probs is None else self.probs[rows]
