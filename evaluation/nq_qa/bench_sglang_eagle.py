"""Natural Questions without any context: short factual questions, as chosen by Spec-Bench."""

from __future__ import annotations

from evaluation import harness, questions
from fastmtp.cli import run


def hub_rows():
    return questions.spec_bench_rows("qa.jsonl")


TASK = questions.Task(
    "nq_qa",
    "NQ (closed book)",
    questions.SPEC_BENCH,
    questions.SPEC_BENCH_REVISION,
    hub_rows,
    questions.user_turns,
)


def main(argv: list[str] | None = None) -> None:
    harness.main(TASK, argv)


if __name__ == "__main__":
    run(main)
