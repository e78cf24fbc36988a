"""The page of `fastmtp doctor --budget`: one column per model, and what the numbers rest on."""

from __future__ import annotations

from collections.abc import Sequence

from fastmtp.budget import estimate, measured
from fastmtp.budget.cards import CARDS, Card
from fastmtp.budget.shapes import SHAPES, context_bytes, head_bytes, model_bytes, rows_bytes, shape_of
from fastmtp.show import markdown

MAP = 32768  # rows of the draft vocabulary that is set beside the whole one
STEPS = (3, 5)  # drafts per cycle, K
DATA, EPOCHS = 16e6, 2  # answer tokens to distil, and how often they are trained on


def budget(model: str, card: Card, taus: Sequence[float]) -> dict:
    """Bytes, milliseconds, accept lengths that pay, hours; None where the card's memory does not suffice."""
    shape = shape_of(model)
    vocabularies = {"whole": shape["vocab_size"], "map": min(MAP, shape["vocab_size"])}
    served, trained = estimate.serves(shape, card), estimate.training_memory(shape) <= card.memory
    plain = estimate.plain_time(shape, card)
    cycles = []
    for steps in STEPS:
        for name, rows in vocabularies.items():
            time = estimate.cycle_time(shape, card, steps, rows)
            bound = estimate.cycle_time(shape, card, steps, rows, overheads=False)
            speedups = {str(tau): tau * plain / time if served else None for tau in taus}
            cycles.append(
                {"num_steps": steps, "draft_vocabulary": name, "bound_ms": bound * 1000}
                | {"expected_ms": time * 1000 if served else None, "speedups": speedups}
                | {"pays_from_tau": time / plain if served else None}
            )
    distilled = estimate.distilling_rate(shape, card) if served else None
    learnt = estimate.training_rate(shape, card, STEPS[0]) if trained else None
    return {
        "model": model,
        "weights_bytes": model_bytes(shape),
        "head_bytes": head_bytes(shape),
        "draft_vocabulary_bytes": {name: rows_bytes(shape, rows) for name, rows in vocabularies.items()},
        "context_bytes_per_token": context_bytes(shape) * shape["num_hidden_layers"],
        "fits": served,
        "plain_ms": _times(estimate.plain_time, shape, card, served),
        "draft_ms": {
            name: _times(estimate.draft_time, shape, card, served, rows)
            for name, rows in vocabularies.items()
        },
        "cycles": cycles,
        "distil": {"answer_tokens": DATA, "tokens_per_second": distilled, "hours": _hours(DATA, distilled)},
        "train": {
            "epochs": EPOCHS,
            "tokens_per_second": learnt,
            "hours": _hours(EPOCHS * DATA / estimate.ANSWER, learnt),
            "memory_bytes": estimate.training_memory(shape),
        },
    }


def _times(time, shape: dict, card: Card, served: bool, *arguments: int) -> dict:
    bound = time(shape, card, *arguments, overheads=False)
    return {"bound": bound * 1000, "expected": time(shape, card, *arguments) * 1000 if served else None}


def _hours(tokens: float, rate: float | None) -> float | None:
    return None if rate is None else tokens / rate / 3600


def table(card: Card, columns: Sequence[dict]) -> str:
    """The budgets of some models on one card, as markdown."""
    rows = [
        ("weights, GB", [_gb(c["weights_bytes"]) for c in columns]),
        ("head, GB", [_gb(c["head_bytes"]) for c in columns]),
        ("draft vocabulary, whole / 32k map, GB", [_pair(c["draft_vocabulary_bytes"], _gb) for c in columns]),
        ("keys and values, kB per token", [f"{c['context_bytes_per_token'] / 1e3:.0f}" for c in columns]),
        ("fits, to serve", ["yes" if c["fits"] else "no" for c in columns]),
    ]
    for key, title in (("bound", "bound by memory"), ("expected", "expected")):
        rows += [
            (f"{title}: plain step, ms", [_ms(c["plain_ms"][key]) for c in columns]),
            (f"{title}: draft step, whole / 32k, ms", [_drafts(c, key) for c in columns]),
        ]
        for steps in STEPS:
            cells = [_pair(_cycles(c, steps, f"{key}_ms"), _ms) for c in columns]
            rows.append((f"{title}: cycle, K={steps}, whole / 32k, ms", cells))
    for steps in STEPS:
        cells = [_pair(_cycles(c, steps, "pays_from_tau"), _two) for c in columns]
        rows.append((f"**drafting pays from tau**, K={steps}, whole / 32k", cells))
    for tau in columns[0]["cycles"][0]["speedups"]:
        cells = [" / ".join(_two(_cycles(c, k, "speedups")["map"][tau]) for k in STEPS) for c in columns]
        rows.append((f"speed-up at tau {tau}, 32k map, K=3 / 5", cells))
    rows += [
        ("distil 16M answer tokens: tokens/s, hours", [_work(c["distil"]) for c in columns]),
        ("train on them twice: tokens/s, hours", [_work(c["train"]) for c in columns]),
        ("memory for training, one card, GB", [f"{c['train']['memory_bytes'] / 1e9:.0f}" for c in columns]),
    ]
    head = [f"{card.name}: {card.memory / 1e9:.0f} GB, {card.bandwidth / 1e12:.3g} TB/s"]
    return markdown.grid(head + [c["model"] for c in columns], [(title, *cells) for title, cells in rows], 1)


def _cycles(column: dict, steps: int, key: str) -> dict:
    return {c["draft_vocabulary"]: c[key] for c in column["cycles"] if c["num_steps"] == steps}


def _drafts(column: dict, key: str) -> str:
    return _pair({name: times[key] for name, times in column["draft_ms"].items()}, _ms)


def _pair(values: dict, form) -> str:
    return f"{form(values['whole'])} / {form(values['map'])}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _two(value: float | None) -> str:
    return markdown.number(value, ".2f")


def _ms(value: float | None) -> str:
    return markdown.number(value, ".1f" if value is not None and value >= 10 else ".2f")


def _work(stage: dict) -> str:
    rate = stage["tokens_per_second"]
    if rate is None:
        return "-"
    return f"{float(f'{rate:.2g}'):,.0f}, {stage['hours']:.1f}"  # two digits: it is an estimate


def basis(card: Card) -> list[str]:
    """What the numbers rest on, and how far they were off where it was measured. One line each."""
    lines = [
        f"{card.name}: {card.source}. Weights in bfloat16, one stream, short context, {card.engine.name}.",
        f"Distillation: up to {measured.DISTILLED.streams:,} requests in flight. Training: K={STEPS[0]}, one "
        "card, packed rows.",
    ]
    mine = [row for row in estimate.errors() if isinstance(row[0], measured.Pass)]
    mine = [row for row in mine if CARDS[row[0].card].engine is card.engine]
    for fitted, text in ((True, "calibrated with"), (False, "not calibrated with")):
        off = [abs(error) for row, _, error in mine if row.fitted is fitted]
        if off:
            error = f"{sum(off) / len(off):.1%} on average, {max(off):.0%} at most"
            lines.append(f"Error on {len(off)} measured passes that it was {text}: {error}.")
    if card.name not in {row.card for row, _, _ in mine}:
        shape, a10 = SHAPES["mimo-7b"], CARDS["a10"]
        ratio = 2.66 * estimate.plain_time(shape, a10) / estimate.cycle_time(shape, a10, 3, MAP)
        known = f"for the paper's A10 (7B, K=3, tau 2.66) it says {ratio:.2f}x, the paper 2.03x"
        lines.append(f"Nothing was measured on this card; {known}.")
    return lines
