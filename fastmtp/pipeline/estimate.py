"""How long a speedrun takes and how much disk it needs, before it starts: rough, and good for choosing sizes.

The rates are those of `fastmtp doctor --budget` on one NVIDIA H100, for the known shape nearest in size.
"""

from __future__ import annotations

from pathlib import Path

from fastmtp.budget import estimate as budget
from fastmtp.budget.cards import CARDS
from fastmtp.budget.shapes import BYTES, SHAPES, model_bytes
from fastmtp.formats.weights import weight_files

CARD = CARDS["h100"]
GGUF_BYTES = 0.7  # per weight, of a file with mostly four bits
EXACT = 0.1  # of one chat's tokens/s, in float32
ANSWER_TOKENS = 200  # of an answer whose limit is 400 or more; half of the limit otherwise
ASKED_TOKENS = 300  # of an answer to a benchmark question
SERVER = 70  # seconds until a server answers
TASKS = 7


def billions(model: str) -> float | None:
    """Weights of a model folder or GGUF file, in billions; None for one that is not here."""
    path = Path(model)
    if path.is_file():
        return path.stat().st_size / GGUF_BYTES / 1e9
    if path.is_dir():
        return sum(file.stat().st_size for file in weight_files(path)) / BYTES / 1e9
    return None


def rates(size: float) -> tuple[float, float, float]:
    """Tokens per second of distilling, of one chat without drafts, and of training with K=3, for `size`
    billions of weights.
    """
    weights = {name: model_bytes(shape) / BYTES / 1e9 for name, shape in SHAPES.items()}
    near = min(weights, key=lambda name: abs(weights[name] / size - 1))
    shape, ratio = SHAPES[near], weights[near] / size
    plain = 1 / budget.plain_time(shape, CARD)
    return tuple(
        ratio * r for r in (budget.distilling_rate(shape, CARD), plain, budget.training_rate(shape, CARD, 3))
    )


def seconds(plan, size: float, prompts: int, epochs: float) -> dict[str, float]:
    """Stage -> seconds on `plan.gpus` GPUs, for a model of `size` billions of weights."""
    tokens, gpus = answers(plan, prompts), plan.gpus
    distilled, plain, trained = rates(size)
    arms, questions = 10, TASKS * plan.num_questions
    return {
        "prepare": (60 if plan.model.endswith(".gguf") else 3) * size + 10,
        "distil": SERVER + tokens / distilled / gpus,
        "curate": 5 + tokens / 500_000,
        "fit": 20 + 10 * size,
        "start": 4 + size,
        "maps": 10 + tokens / 500_000,
        "train": 75 + epochs * tokens / budget.ANSWER / trained / gpus,
        "export": 4 + size,
        "acceptance": 60 + 10 * size,
        "evaluate": arms * (SERVER + questions * ASKED_TOKENS / plain) / gpus,
        "report": 10,
        "lossless": 2 * (SERVER + TASKS * 4 * ASKED_TOKENS / (EXACT * plain)),
    }


def gigabytes(plan, size: float, prompts: int) -> float:
    """Three copies of the model in bfloat16, the answers as text and ids before and after curation, and
    three checkpoints of the head (a twentieth of the model) with their optimiser.
    """
    return 3 * 2 * size + 40 * answers(plan, prompts) / 1e9 + 3 * 12 * size / 20


def answers(plan, prompts: int) -> float:
    """Answer tokens to expect."""
    limit = plan.max_new_tokens or 2 * ANSWER_TOKENS
    return prompts * min(ANSWER_TOKENS, limit / 2)


def spoken(duration: float) -> str:
    return f"{duration:.0f} s" if duration < 90 else f"{duration / 60:.0f} min"
