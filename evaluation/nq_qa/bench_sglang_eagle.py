"""Natural Questions without any context: short factual questions, as chosen by Spec-Bench."""

from __future__ import annotations

from evaluation import harness
from fastmtp.cli import run


def hub_rows():
    return harness.spec_bench_rows("qa.jsonl")


TASK = harness.Task(
    "nq_qa", "NQ (closed book)", harness.SPEC_BENCH, harness.SPEC_BENCH_REVISION, hub_rows, harness.user_turns
)


def main(argv: list[str] | None = None) -> None:
    harness.main(TASK, argv)


if __name__ == "__main__":
    run(main)
