"""LiveCodeBench v6: programming problems, answered with a Python program."""

from __future__ import annotations

from evaluation import harness, questions
from fastmtp.cli import run

DATASET, REVISION = "livecodebench/code_generation_lite", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
SYSTEM = "You are an expert Python programmer. Solve the given problem with a correct Python program."


def hub_rows():
    import datasets

    # The data set's own loader is a script, which `datasets` no longer runs; release v6 added this file.
    url = f"hf://datasets/{DATASET}@{REVISION}/test6.jsonl"
    return datasets.load_dataset("json", data_files=url, split="train")


def turns(row: dict) -> list[str]:
    """The statement and, where there is one, the starter code to complete; else a program on stdin and
    stdout.
    """
    if row["starter_code"].strip():
        how = "Complete this starter code and answer with the whole program:"
        frame = row["starter_code"]
    else:
        how = "Read from standard input, write to standard output, and answer with the whole program:"
        frame = "# your program"
    return [f"{row['question_content']}\n\n{how}\n```python\n{frame}\n```"]


TASK = questions.Task("livecodebench", "LiveCodeBench v6", DATASET, REVISION, hub_rows, turns, SYSTEM)


def main(argv: list[str] | None = None) -> None:
    harness.main(TASK, argv)


if __name__ == "__main__":
    run(main)
