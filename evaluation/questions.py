"""A benchmark's questions: a local file or the Hub's data set at a fixed revision -> user turns.

A question is asked whole or refused by file and line: no part of it is left out, and no empty field becomes
the word "None".
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fastmtp.cli import InputError
from fastmtp.inputs import read_jsonl

# Fields that would be part of a question, with the row names of other data sets; capitals do not matter.
PARTS = ("system", "system_prompt", "system_message", "context", "contexts", "ctxs", "passage", "passages")
PARTS += ("document", "documents", "article", "instruction", "input", "messages", "conversation")
PARTS += ("conversations", "tools", "functions", "image", "images", "audio", "video")
CHOICES = ("options", "choices", "A", "B", "C", "D")
CHOICE = re.compile(r"(?:(?:option|choice)[_ ]?)?[a-d]", re.IGNORECASE)  # other names of A to D


class Unfit(Exception):
    """A row that cannot be asked whole; the message says why."""


@dataclass(frozen=True)
class Task:
    """A benchmark. `turns(row)` gives the user turns of one row, or raises Unfit.

    `hub_rows()` loads the published questions; `revision` None means that the Hub's newest is taken. asks:
    the fields of PARTS and CHOICES that `turns` reads.
    """

    name: str
    title: str
    dataset: str
    revision: str | None
    hub_rows: Callable[[], Iterable[dict]]
    turns: Callable[[dict], list[str]]
    system: str = ""
    asks: tuple[str, ...] = ()


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
            questions.append(_question(task, row))
        except Unfit as error:
            raise InputError(f"{place}: {error}; fix or remove this line") from None
    source = question_file or task.dataset
    if not questions:
        raise InputError(f"{source}: no questions; give a file with at least one line")
    repeated = len(questions) - len(set(question_keys(task, questions)))
    if repeated:
        print(
            f"{source}: {repeated} of {len(questions)} questions are repeated and asked once", file=sys.stderr
        )
    return questions


def _question(task: Task, row: dict) -> list[str]:
    """User turns of a row; raises Unfit if a part of the question would be lost or cannot be sent."""
    turns = task.turns(row)
    if not turns or not all(turn.strip() for turn in turns):
        raise Unfit("an empty question")
    for name, value in row.items():
        said = isinstance(value, str) and value in "\n".join(turns)  # the question has it already
        part = name.lower() in PARTS and not said or name in CHOICES or CHOICE.fullmatch(name)
        if name.lower().startswith("system") and task.system:
            continue  # the benchmark always uses its own system text
        if part and value and name not in task.asks:
            raise Unfit(
                f"the field '{name}' is not asked in {task.name}, so a part of the question would be lost"
            )
    return turns


def text(row: dict, name: str, missing: str | None = None) -> str:
    """A field of text. Raises Unfit for another type, and for an absent or null one unless `missing` says
    what it then is.
    """
    value = row.get(name)
    if value is None and missing is not None:
        return missing
    if value is None:
        raise Unfit(f"the field '{name}' is null" if name in row else f"no field '{name}'")
    if not isinstance(value, str):
        raise Unfit(f"the field '{name}' must be text, not {_kind(value)}")
    return value


def user_turns(row: dict) -> list[str]:
    """Spec-Bench and MT-Bench rows: a list of texts in `turns` or `prompt`, or one text."""
    values = [(name, row[name]) for name in ("turns", "prompt") if row.get(name) is not None]
    if not values:
        names = [name for name in ("turns", "prompt") if name in row]
        raise Unfit(f"the field '{names[0]}' is null" if names else "no field 'turns' or 'prompt'")
    if len(values) == 2 and values[0][1] != values[1][1]:
        raise Unfit("'turns' and 'prompt' are two different questions")
    name, value = values[0]
    turns = [value] if isinstance(value, str) else value
    if not isinstance(turns, list):
        raise Unfit(f"the field '{name}' must be a text or a list of texts, not {_kind(value)}")
    for turn in turns:
        if not isinstance(turn, str):
            raise Unfit(f"every turn in '{name}' must be text, not {_kind(turn)}")
    return list(turns)


def choices(row: dict) -> dict[str, str]:
    """Letter -> choice of a multiple-choice row: fields A, B, ..., or a list or object in `options` or
    `choices`; {} if it has none.
    """
    source, listed = row, [name for name in ("options", "choices") if row.get(name) is not None]
    lettered = [name for name in "ABCDEFGH" if row.get(name) not in (None, "")]
    if len(listed) + bool(lettered) > 1:
        raise Unfit(f"choices in '{listed[0]}' and in '{[*listed, *lettered][1]}'; keep one of them")
    if listed:
        value = row[listed[0]]
        source = dict(zip("ABCDEFGH", value, strict=False)) if isinstance(value, list) else value
        if not isinstance(source, dict) or len(source) != len(value) or not source:
            raise Unfit(f"the field '{listed[0]}' must be a list or an object of choices, not {_kind(value)}")
    # Tables of several exams have columns beyond D, which are null for questions of four choices.
    letters = [
        letter for letter in "ABCDEFGH" if letter in source and (letter < "E" or not _blank(source[letter]))
    ]
    if listed and len(letters) != len(source):
        raise Unfit(f"the field '{listed[0]}' must name its choices A, B, C, ...")
    if letters != list("ABCDEFGH"[: len(letters)]) or len(letters) == 1:
        raise Unfit(f"choices {', '.join(letters)} alone")
    return {letter: _choice(letter, source[letter]) for letter in letters}


def _choice(letter: str, value: object) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool) and not _blank(value):
        return str(value)
    raise Unfit(f"choice {letter} is {'empty' if value is not None and _blank(value) else _kind(value)}")


def _blank(value: object) -> bool:
    """null, NaN (what a table writes for null), or a text without a character to read."""
    return value is None or isinstance(value, float) and math.isnan(value) or not str(value).strip()


def _kind(value: object) -> str:
    """What JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _hub(task: Task) -> Iterable[dict]:
    try:
        return task.hub_rows()
    except Exception as error:  # `datasets` raises a dozen kinds: no network, gone, gated, not installed
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{task.dataset}: cannot be loaded ({first}); or give --question-file") from None


def question_keys(task: Task, questions: list[list[str]]) -> list[str]:
    """What an answer is filed under: the question's content."""
    return [digest([task.system, turns]) for turns in questions]
