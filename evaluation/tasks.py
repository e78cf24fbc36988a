"""The seven benchmarks: where their questions come from, and how a row becomes what the model is asked.

A new benchmark is one more entry of TASKS and a folder with a bench_sglang_eagle.py, a copy of any other.
"""

from __future__ import annotations

from collections.abc import Iterable

from evaluation.c_eval.subjects import SUBJECTS
from evaluation.questions import Task, Unfit, choices, text, user_turns
from fastmtp.cli import InputError

# Spec-Bench's choice of questions, of which three of the seven benchmarks are made.
SPEC_BENCH, SPEC_BENCH_REVISION = "RedHatAI/speculator_benchmarks", "2ae86affa2cb97a972b7fc681dd51c04fbff083e"


def _rows(dataset: str, revision: str, split: str) -> Iterable[dict]:
    import datasets

    return datasets.load_dataset(dataset, split=split, revision=revision)


def _file_rows(dataset: str, revision: str, name: str) -> Iterable[dict]:
    """Rows of one JSON file of a data set, past the data set's own loader."""
    import datasets

    url = f"hf://datasets/{dataset}@{revision}/{name}"
    return datasets.load_dataset("json", data_files=url, split="train")


def _spec_bench(name: str, title: str, file_name: str) -> Task:
    dataset, revision = SPEC_BENCH, SPEC_BENCH_REVISION
    return Task(name, title, dataset, revision, lambda: _file_rows(dataset, revision, file_name), user_turns)


def mt_bench() -> Task:
    """80 open questions of two turns; the second turn follows the model's own first answer."""
    dataset, revision = "HuggingFaceH4/mt_bench_prompts", "e3a795c5e9a82ee40611c416b8a7786c73198991"
    return Task(
        "mt_bench", "MT-Bench", dataset, revision, lambda: _rows(dataset, revision, "train"), user_turns
    )


def math_500() -> Task:
    """Competition mathematics, answered step by step."""
    dataset, revision = "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"

    def turns(row: dict) -> list[str]:
        problem = text(row, "problem")
        if not problem.strip():
            raise Unfit("an empty question")
        return [problem + "\n\nReason step by step and put your final answer within \\boxed{}."]

    return Task("math_500", "MATH-500", dataset, revision, lambda: _rows(dataset, revision, "test"), turns)


def livecodebench() -> Task:
    """Programming problems, answered with a Python program."""
    dataset = "livecodebench/code_generation_lite"
    revision = "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
    system = "You are an expert Python programmer. Solve the given problem with a correct Python program."

    def turns(row: dict) -> list[str]:
        """The statement and the starter code to complete; without one, a program on stdin and stdout."""
        problem, frame = text(row, "question_content"), text(row, "starter_code", missing="")
        if not problem.strip():
            raise Unfit("an empty question")
        how = "Complete this starter code and answer with the whole program:"
        if not frame.strip():
            how = "Read from standard input, write to standard output, and answer with the whole program:"
            frame = "# your program"
        return [f"{problem}\n\n{how}\n```python\n{frame}\n```"]

    # The data set's own loader is a script, which `datasets` no longer runs; release v6 added this file.
    return Task(
        "livecodebench",
        "LiveCodeBench v6",
        dataset,
        revision,
        lambda: _file_rows(dataset, revision, "test6.jsonl"),
        turns,
        system,
    )


def c_eval() -> Task:
    """Chinese multiple-choice questions over 52 subjects, two of each."""
    dataset, revision = "ceval/ceval-exam", "617524a00b307ff6f9933702f724131fe12ca7ce"

    def hub_rows() -> list[dict]:
        """One question of every subject, then a second of each, so that few questions cover many subjects."""
        import datasets

        splits = {s: datasets.load_dataset(dataset, s, split="val", revision=revision) for s in SUBJECTS}
        pairs = [(n, subject, rows) for n in range(2) for subject, rows in splits.items()]
        return [dict(rows[n], subject=subject) for n, subject, rows in pairs if n < len(rows)]

    def turns(row: dict) -> list[str]:
        """The Hub's rows have their choices in fields of their own; other files have them in the question."""
        question, letters = text(row, "question"), choices(row)
        if not question.strip():
            raise Unfit("an empty question")
        if not letters:
            return [question]
        subject = text(row, "subject", missing="")
        exam = f"中国关于{SUBJECTS.get(subject, subject)}考试的" if subject.strip() else ""
        lines = "".join(f"\n{letter}. {choice}" for letter, choice in letters.items())
        return [f"以下是{exam}单项选择题，请选出其中的正确答案。\n{question}{lines}\n"]

    asks = ("options", "choices", "A", "B", "C", "D")
    return Task("c_eval", "C-Eval", dataset, revision, hub_rows, turns, asks=asks)


TASKS = {
    task.name: task
    for task in (
        mt_bench(),
        livecodebench(),
        math_500(),
        _spec_bench("nq_qa", "NQ (closed book)", "qa.jsonl"),
        _spec_bench("nq_rag", "NQ (retrieval)", "rag.jsonl"),
        _spec_bench("cnn_dm", "CNN/DM", "summarization.jsonl"),
        c_eval(),
    )
}


def parse_tasks(names: str) -> list[Task]:
    """`all` or a comma-separated list."""
    if names == "all":
        return list(TASKS.values())
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in TASKS]
    if unknown or not chosen:
        raise InputError(
            f"--tasks: '{', '.join(unknown) or names}' is not a task; choose all or {', '.join(TASKS)}"
        )
    return [TASKS[name] for name in dict.fromkeys(chosen)]
