"""Finished answers as token ids, for whoever measures or fits a head: distilled samples, or curated rows.

A sample has `prompt_ids` and `output_ids`, ids of the model whose head is measured. A row that cannot be read
is an error that names its line: a figure over fewer answers than were given would be another figure.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

from fastmtp.chat import IGNORE, encode_chat, exact_ids
from fastmtp.cli import InputError
from fastmtp.data.messages import ROLES, check_ids, text_field
from fastmtp.inputs import read_jsonl


def read_samples(path: str | Path, vocab_size: int, limit: int | None = None, tokenizer=None) -> list[dict]:
    """Distilled samples of a jsonl file, or with a `tokenizer` curated rows too, whose last answer is then
    the output. `source` and `lang` are texts, "" if the row has none.

    Raises InputError naming the line for ids that are missing, not the model's, or (with a `tokenizer`) spell
    another answer than the row's messages.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, not {limit}")
    samples = []
    for number, row in read_jsonl(path):
        place = f"{path}:{number}"
        labels = {name: text_field(row, name, place) or "" for name in ("source", "lang")}
        messages = _messages(row, place)
        answered = bool(messages) and messages[-1].get("role") == "assistant"
        if tokenizer is not None and row.get("output_ids") is None and answered:
            row = {**row, **last_answer(tokenizer, messages, place)}
        for name in ("prompt_ids", "output_ids"):
            if not row.get(name):
                raise InputError(f"{place}: no `{name}`; give distilled samples (python -m fastmtp.distill)")
            check_ids(row[name], name, place, vocab_size)
        if tokenizer is not None and answered:
            _check_spelling(tokenizer, row["output_ids"], messages[-1], place)
        samples.append({**row, **labels})
        if len(samples) == limit:
            break
    if not samples:
        raise InputError(f"{path}: no samples; check the file")
    return samples


def check_measurable(path: str | Path, samples: list[dict]) -> None:
    """InputError if no answer has a second token: then nothing is verified, and tau is unknown."""
    if all(len(sample["output_ids"]) < 2 for sample in samples):
        raise InputError(f"{path}: no answer has two tokens, so nothing is drafted; give longer answers")


def last_answer(tokenizer, messages: list[dict], place: str) -> dict[str, list[int]]:
    """`prompt_ids` and `output_ids` of a chat's last turn; the ids that training would see."""
    try:
        ids, labels = encode_chat(tokenizer, messages)
    except Exception as error:  # the template is the model's own code, and refuses in its own words
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{place}: cannot be read as a chat ({reason}); fix or remove this line") from None
    start = max((i + 1 for i, label in enumerate(labels) if label == IGNORE), default=0)
    return {"prompt_ids": ids[:start], "output_ids": ids[start:]}


def _messages(row: dict, place: str) -> list[dict]:
    """A row's messages, [] if it has none; an answer's content may be exact ids. Raises InputError."""
    messages = row.get("messages") or []
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{place}: `messages` must be a list of {{role, content}}; fix or remove this line")
    for message in messages:
        if message.get("role") not in ROLES:
            raise InputError(
                f"{place}: a message has the role {message.get('role')!r}, expected {', '.join(ROLES)}; "
                "fix or remove this line"
            )
        content, own = message.get("content"), message["role"] == "assistant"
        exact = own and isinstance(content, dict) and isinstance(content.get("token_ids"), list)
        if content is not None and not isinstance(content, str) and not exact:
            raise InputError(f"{place}: a message's `content` is not a text; fix or remove this line")
        if content is None and row.get("output_ids") is None:
            raise InputError(f"{place}: a message has no `content`; fix or remove this line")
    return messages


def check_answers(tokenizer, messages: list[dict], place: str) -> None:
    """InputError for answers of a chat whose exact ids are not the tokenizer's, or spell other text."""
    for message in messages:
        ids = exact_ids(message)
        if ids is not None:
            check_ids(ids, "token_ids", place, len(tokenizer))
            _check_spelling(tokenizer, ids, message, place, "token_ids")


def _check_spelling(tokenizer, ids: list[int], message: dict, place: str, name: str = "output_ids") -> None:
    """InputError for ids of another tokenizer: they spell other text than the answer beside them."""
    text = message.get("content")
    if not isinstance(text, str) or not text.strip():
        return
    if not spells(tokenizer, ids, text):
        raise InputError(
            f"{place}: `{name}` spell other text than the answer beside them; distil with this model"
        )


def spells(tokenizer, ids: list[int], text: str) -> bool:
    """Whether `ids` are `text`, as the tokenizer writes it; spaces and special tokens apart."""
    spelt = _packed(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    if spelt == _packed(text):
        return True
    own = tokenizer(text, add_special_tokens=False)["input_ids"]  # a tokenizer may normalise what it reads
    return spelt == _packed(tokenizer.decode(own, skip_special_tokens=True))


def _packed(text: str) -> str:
    """A text without its spaces, its accents composed: some tool may have done so to the text alone."""
    return unicodedata.normalize("NFC", "".join(text.split()))
