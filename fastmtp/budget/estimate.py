"""Times of a plain step, a draft step and a cycle; tokens per second of distillation and of training.

A pass at one stream takes the bytes that it reads over the bandwidth that such products reach, plus what an
engine adds to each layer, draft step and cycle (cards.Engine). A cycle is one verify pass and K draft steps;
it gives tau tokens, a plain step one, so drafting pays from tau = cycle / plain on. Seconds and bytes.
"""

from __future__ import annotations

from fastmtp.budget import measured
from fastmtp.budget.cards import CARDS, Card
from fastmtp.budget.shapes import (
    BYTES,
    SHAPES,
    backbone_bytes,
    context_bytes,
    draft_bytes,
    head_bytes,
    layer_bytes,
    model_bytes,
)

# Fitted to measured.RATES: the share of the data sheet's operations that training reaches (--recompute), and
# the seconds per token that do not grow with the model; the share that products of many rows reach.
TRAINED, PER_TOKEN, MATRIX = 0.424, 4.25e-6, 0.73
ANSWER = 0.75  # share of answer tokens in what is trained on, as benchmarks.train_throughput assumes
CONTEXT = 200  # tokens that a request in flight holds on average while it is distilled
ROOM = 0.9  # of the memory, for weights; the rest for keys, values and workspace
ACTIVATIONS = 12e9  # bytes in training beside weights and optimiser, with packed rows of 8,192 tokens
OPTIMISER = 16  # bytes per weight of the head: float32 weight, gradient, two moments


def plain_time(shape: dict, card: Card, overheads: bool = True) -> float:
    """One token without drafts. Without `overheads`: the bound that the data sheet's bandwidth sets."""
    if not overheads:
        return backbone_bytes(shape) / card.bandwidth
    added = shape["num_hidden_layers"] * card.engine.layer
    return backbone_bytes(shape) / (card.engine.share * card.bandwidth) + added


def draft_time(shape: dict, card: Card, rows: int, overheads: bool = True) -> float:
    """One draft step over `rows` rows of the output matrix."""
    if not overheads:
        return draft_bytes(shape, rows) / card.bandwidth
    added = card.engine.layer + card.engine.draft
    return draft_bytes(shape, rows) / (card.engine.share * card.bandwidth) + added


def cycle_time(shape: dict, card: Card, num_steps: int, rows: int, overheads: bool = True) -> float:
    """One verify pass with `num_steps` draft steps."""
    time = plain_time(shape, card, overheads) + num_steps * draft_time(shape, card, rows, overheads)
    return max(time + card.engine.cycle, card.engine.shortest) if overheads else time


def serves(shape: dict, card: Card) -> bool:
    """Whether backbone and head lie in the card's memory."""
    return model_bytes(shape) + head_bytes(shape) <= ROOM * card.memory


def decoding_rate(shape: dict, card: Card, streams: int) -> float | None:
    """Tokens per second without drafts over all streams, prefill left out; None without a matrix rate."""
    if card.rate is None:
        return None
    context = CONTEXT * context_bytes(shape) * shape["num_hidden_layers"]
    context /= card.engine.share * card.bandwidth
    products = backbone_bytes(shape) / (MATRIX * card.rate)  # two operations and two bytes per weight
    return streams / (plain_time(shape, card) + streams * (products + context))


def in_flight(shape: dict, card: Card) -> int:
    """Requests that an engine keeps going at once: as many as `fastmtp.distill` asks, if the memory that the
    weights leave holds their keys and values.
    """
    request = CONTEXT * context_bytes(shape) * shape["num_hidden_layers"]
    return max(1, min(measured.DISTILLED.streams, int((ROOM * card.memory - model_bytes(shape)) / request)))


def distilling_rate(shape: dict, card: Card) -> float | None:
    """Tokens per second of `fastmtp.distill` with one engine; None without a matrix rate. What prompts,
    sampling and the last answers leave of `decoding_rate` was measured once.
    """
    rate, row = decoding_rate(shape, card, in_flight(shape, card)), measured.DISTILLED
    ideal = decoding_rate(SHAPES[row.shape], CARDS[row.card], row.streams)
    return None if rate is None else rate * row.tokens / ideal


def training_operations(shape: dict, num_steps: int) -> float:
    """Operations per token that training needs, attention's pairs left out (3 % at 7B): 2 per weight for the
    backbone, three times that for the head at each step's tokens, 4 per weight of the output matrix and
    target.
    """
    backbone = 2 * shape["num_hidden_layers"] * layer_bytes(shape) / BYTES
    head = 3 * (1 + (num_steps - 1) * ANSWER) * 2 * head_bytes(shape) / BYTES
    return backbone + head + 4 * num_steps * ANSWER * shape["hidden_size"] * shape["vocab_size"]


def training_rate(shape: dict, card: Card, num_steps: int) -> float | None:
    """Tokens per second of training, prompts included; None without a matrix rate."""
    if card.rate is None:
        return None
    return 1 / (training_operations(shape, num_steps) / (TRAINED * card.rate) + PER_TOKEN)


def training_memory(shape: dict) -> float:
    return model_bytes(shape) + OPTIMISER * head_bytes(shape) / BYTES + ACTIVATIONS


def errors() -> list[tuple[measured.Pass | measured.Rate, float, float]]:
    """What was measured, its estimate in the same unit, and by which share the estimate is off."""
    rows = []
    for row in measured.DECODING:
        shape, card = SHAPES[row.shape], CARDS[row.card]
        time = plain_time(shape, card)
        if row.num_steps:
            time = cycle_time(shape, card, row.num_steps, row.rows or shape["vocab_size"])
        rows.append((row, time * 1000, time * 1000 / row.ms - 1))
    for row in measured.RATES:
        shape, card = SHAPES[row.shape], CARDS[row.card]
        rate = decoding_rate(shape, card, row.streams) if row.streams else training_rate(shape, card, 3)
        rows.append((row, rate, rate / row.tokens - 1))
    return rows
