"""How long a speedrun takes and how much disk it needs, before it starts: rough, and good for choosing sizes.

The rates were measured on one NVIDIA H200 with a 1.5B and a 7B model in bfloat16; an H100 has less memory
bandwidth, so its stages that decode take about a third longer.
"""

from __future__ import annotations

from pathlib import Path

from fastmtp.formats.weights import weight_files

GGUF_BYTES = 0.7  # per weight, of a file with mostly four bits
MEASURED = 1.5  # billions of weights of the model that the rates below were measured with
DISTILLED, PLAIN, EXACT = 25_000, 500, 45  # its tokens/s: a GPU full of chats, one chat, one chat in float32
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
        return sum(file.stat().st_size for file in weight_files(path)) / 2 / 1e9
    return None


def seconds(plan, size: float, prompts: int, epochs: float) -> dict[str, float]:
    """Stage -> seconds on `plan.gpus` GPUs, for a model of `size` billions of weights."""
    tokens, slower, gpus = answers(plan, prompts), size / MEASURED, plan.gpus
    arms, questions = 10, TASKS * plan.num_questions
    training = (9.4 + 4.75 * size) * 1e-6  # seconds per token: 60,000 tokens/s at 1.5B, 22,000 at 7.6B
    return {
        "prepare": (60 if plan.model.endswith(".gguf") else 3) * size + 10,
        "distil": 110 + tokens * slower / DISTILLED / gpus,
        "curate": 5 + tokens / 500_000,
        "fit": 20 + 10 * size,
        "start": 4 + size,
        "maps": 10 + tokens / 500_000,
        "train": 60 + epochs * 1.5 * tokens * training / gpus,
        "export": 4 + size,
        "acceptance": 60 + 10 * size,
        "evaluate": arms * (SERVER + questions * ASKED_TOKENS * slower / PLAIN) / gpus,
        "report": 10,
        "lossless": 2 * (SERVER + TASKS * 4 * ASKED_TOKENS * slower / EXACT),
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
