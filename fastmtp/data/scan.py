"""What one distilled line comes to: a training row with its signatures, or the reason why it is left out.

A line that breaks the distiller's contract is an error that names it. Ids that are whole numbers but not the
model's, or that spell other text than the answer beside them, came from another tokenizer: those lines are
left out and counted, and `curate` stops if they are many.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastmtp.cli import InputError
from fastmtp.data.cleaning import CleanConfig, verdict
from fastmtp.data.dedup import Questions, signature
from fastmtp.data.messages import check_ids, check_messages, refuse_unread, text_field
from fastmtp.data.samples import spells
from fastmtp.data.units import letters, units
from fastmtp.inputs import json_object, read_json
from fastmtp.tokenizer import load_tokenizer

FOREIGN = {
    "unknown_ids": "token ids beyond the model's vocabulary",
    "other_text": "token ids that spell other text than the answer beside them",
}


class Scanned(NamedTuple):
    """What one input line comes to. `reason` is None for a clean sample, and only then are the last six
    filled in.
    """

    reason: str | None
    source: str
    tokens: int  # of its answers
    preview: str
    row: bytes = b""  # the training row, JSON
    key: bytes = b""  # of its words, numbers and operators, prompt and answers
    prompt_key: bytes = b""
    letters_key: bytes = b""  # of the prompt's words alone
    sample_signature: bytes = b""
    prompt_signature: bytes = b""


class Spelling:
    """The model's tokenizer, to tell its ids from those of another."""

    def __init__(self, model: str):
        self.tokenizer = load_tokenizer(model)
        config = Path(model) / "config.json"
        size = read_json(config).get("vocab_size") if config.is_file() else None
        self.size = max(len(self.tokenizer), size if type(size) is int else 0)

    def fault(self, sample: dict, answers: list[tuple[str, list[int]]]) -> str | None:
        """A key of FOREIGN, or None if the sample's ids are the model's and spell its answers."""
        lists = [ids for _, ids in answers] + [
            sample.get(name) or [] for name in ("prompt_ids", "output_ids")
        ]
        if any(i >= self.size for ids in lists for i in ids):
            return "unknown_ids"
        if all(spells(self.tokenizer, ids, text) for text, ids in answers):
            return None
        return "other_text"


@dataclass
class Rules:
    """What every line is judged by. spelling: None if the model is not known."""

    clean: CleanConfig
    questions: Questions
    spelling: Spelling | None = None


def training_row(sample: dict, place: str) -> tuple[list[dict], list[tuple[str, list[int]]]]:
    """A distilled sample -> (messages in ms-swift's form, texts and ids of the model's answers).

    An answer of the model is `{"token_ids": [...]}`, never text to tokenise again. An assistant turn without
    ids was given with the prompt; it stays text and gets `"loss": false`, as no one is to learn it. Every row
    holds ids, which also keeps the `datasets` JSON reader from taking `content` for a plain string column.
    Raises InputError, starting with `place`, for a sample that breaks the contract.
    """
    refuse_unread(sample, place)
    messages = sample.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise InputError(
            f"{place}: 'messages' must be a list of a prompt and its answer; fix or remove this line"
        )
    check_messages(messages, place)
    if messages[-1]["role"] != "assistant":
        raise InputError(
            f"{place}: the last message is no answer; write this file with `python -m fastmtp.distill`"
        )
    for name in ("prompt_ids", "output_ids"):
        if sample.get(name) is not None:
            check_ids(sample[name], name, place)
    row, answers = [], []
    for number, message in enumerate(messages):
        ids = _answer_ids(sample, number, place)
        if ids is not None:
            answers.append((message["content"], ids))
            row.append({"role": "assistant", "content": {"token_ids": ids}})
        else:
            extra = {"loss": False} if message["role"] == "assistant" else {}
            row.append({"role": message["role"], "content": message["content"]} | extra)
    return row, answers


def _answer_ids(sample: dict, number: int, place: str) -> list[int] | None:
    """Exact ids of message `number`; None if it is no answer of the model."""
    message, last = sample["messages"][number], number == len(sample["messages"]) - 1
    ids = message.get("token_ids") if message["role"] == "assistant" else None
    if ids is not None:
        check_ids(ids, f"token_ids' of message {number} '", place)
    if not last:
        return ids
    output = sample.get("output_ids")
    if ids is None and output is None:
        raise InputError(f"{place}: the answer has no 'token_ids'; write it with `python -m fastmtp.distill`")
    if None not in (ids, output) and ids != output:
        raise InputError(
            f"{place}: 'output_ids' are not the last answer's 'token_ids'; fix or remove this line"
        )
    return output if ids is None else ids


def scan_line(line: bytes, place: str, rules: Rules) -> Scanned:
    """Judge one sample by itself and make its signatures."""
    sample = json_object(line, place)
    row, answers = training_row(sample, place)
    source, lang, finish = (text_field(sample, name, place) or "" for name in ("source", "lang", "finish"))
    prompt = "\n".join(m["content"] for m in sample["messages"] if m["role"] == "user")
    whole = "\n".join(m["content"] for m in sample["messages"] if m["role"] != "system")
    tokens = sum(len(ids) for _, ids in answers)
    total = max(tokens, len(sample.get("prompt_ids") or []) + len(sample.get("output_ids") or []))
    texts = [text for text, _ in answers]
    preview = json.dumps([place, prompt[:300], texts[-1][:300], texts[-1][300:][-150:]], ensure_ascii=False)
    reason = rules.spelling.fault(sample, answers) if rules.spelling else None
    reason = reason or verdict(texts, finish, lang, tokens, total, rules.clean)
    if reason is None and rules.questions.find(prompt):
        reason = "benchmark"
    if reason:
        return Scanned(reason, source, tokens, preview)
    return Scanned(
        None,
        source,
        tokens,
        preview,
        json.dumps({"messages": row}, ensure_ascii=False).encode(),
        digest(units(whole)),
        digest(units(prompt)),
        digest(letters(units(prompt))),
        signature(whole).tobytes(),
        signature(prompt).tobytes(),
    )


def digest(parts: tuple[str, ...] | list[str]) -> bytes:
    """Key under which texts of the same units fall together: 16 bytes."""
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).digest()
