"""MATH-500: competition mathematics, answered step by step."""

from __future__ import annotations

from evaluation import harness, questions
from fastmtp.cli import run

DATASET, REVISION = "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"


def hub_rows():
    import datasets

    return datasets.load_dataset(DATASET, split="test", revision=REVISION)


def turns(row: dict) -> list[str]:
    return [row["problem"] + "\n\nReason step by step and put your final answer within \\boxed{}."]


TASK = questions.Task("math_500", "MATH-500", DATASET, REVISION, hub_rows, turns)


def main(argv: list[str] | None = None) -> None:
    harness.main(TASK, argv)


if __name__ == "__main__":
    run(main)
