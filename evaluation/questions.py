"""A benchmark's questions: a local file or the Hub's data set at a fixed revision -> user turns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fastmtp.cli import InputError
from fastmtp.files import read_jsonl

SPEC_BENCH, SPEC_BENCH_REVISION = "RedHatAI/speculator_benchmarks", "2ae86affa2cb97a972b7fc681dd51c04fbff083e"


@dataclass(frozen=True)
class Task:
    """A benchmark. `turns(row)` gives the user turns of one row; it raises KeyError for a row of another
    format.

    `hub_rows()` loads the published questions; `revision` None means that the Hub's newest is taken.
    """

    name: str
    title: str
    dataset: str
    revision: str | None
    hub_rows: Callable[[], Iterable[dict]]
    turns: Callable[[dict], list[str]]
    system: str = ""


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def load_questions(task: Task, question_file: str | Path | None, limit: int) -> list[list[str]]:
    """The first `limit` questions, each a list of user turns. Raises InputError naming the file and line."""
    if question_file is None:
        rows = ((f"{task.dataset} row {n}", row) for n, row in enumerate(_hub(task), 1))
    else:
        rows = ((f"{question_file}:{n}", row) for n, row in read_jsonl(question_file))
    questions = []
    for place, row in rows:
        if len(questions) == limit:
            break
        try:
            turns = task.turns(row)
        except KeyError as error:
            raise InputError(f"{place}: no field {error}; is this a {task.name} question file?") from None
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise InputError(f"{place}: an empty or non-text question; mend or remove this line")
        questions.append(turns)
    if not questions:
        raise InputError(f"{question_file or task.dataset}: no questions; give a file with at least one line")
    return questions


def _hub(task: Task) -> Iterable[dict]:
    try:
        return task.hub_rows()
    except Exception as error:  # `datasets` raises a dozen kinds: no network, gone, gated, not installed
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{task.dataset}: cannot be loaded ({first}); or give --question-file") from None


def spec_bench_rows(file_name: str) -> Iterable[dict]:
    """Rows of one Spec-Bench subset, which three of the seven benchmarks take their questions from."""
    import datasets

    url = f"hf://datasets/{SPEC_BENCH}@{SPEC_BENCH_REVISION}/{file_name}"
    return datasets.load_dataset("json", data_files=url, split="train")


def user_turns(row: dict) -> list[str]:
    """Spec-Bench and MT-Bench rows: a list in `turns` or `prompt`, or one text in `prompt`."""
    value = row["turns"] if "turns" in row else row["prompt"]
    return [value] if isinstance(value, str) else list(value)


def question_keys(task: Task, questions: list[list[str]]) -> list[str]:
    """What an answer is filed under: the question's content."""
    return [digest([task.system, turns]) for turns in questions]
