"""MT-Bench: 80 open questions of two turns; the second turn follows the model's own first answer."""

from __future__ import annotations

from evaluation import harness, questions
from fastmtp.cli import run

DATASET, REVISION = "HuggingFaceH4/mt_bench_prompts", "e3a795c5e9a82ee40611c416b8a7786c73198991"


def hub_rows():
    import datasets

    return datasets.load_dataset(DATASET, split="train", revision=REVISION)


TASK = questions.Task("mt_bench", "MT-Bench", DATASET, REVISION, hub_rows, questions.user_turns)


def main(argv: list[str] | None = None) -> None:
    harness.main(TASK, argv)


if __name__ == "__main__":
    run(main)
