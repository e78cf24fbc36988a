"""Tokenizer, end ids and chat template."""

from __future__ import annotations

from collections.abc import Iterator

from fastmtp.health.folder import ERROR, OK, WARNING, Folder, Line
from fastmtp.inputs import read_json
from fastmtp.tokenizer import end_ids, own_tokenizer, takes_system_turn


def tokenizer(folder: Folder) -> Iterator[Line]:
    own, warning = own_tokenizer(folder.path)
    cure = "prepare the folder again with fastmtp.prepare_model"
    text = warning or f"{type(own).__name__}, reads as tokenizer.json says"
    yield Line("tokenizer", WARNING if warning else OK, text, cure if warning else "")
    size, largest = folder.config.get("vocab_size"), max(own.get_vocab().values())
    if not isinstance(size, int) or largest >= size:
        text = f"its largest id is {largest}, the matrix has {size} rows"
        yield Line("vocabulary", ERROR, text, "copy tokenizer and weights of one model")
    else:
        yield Line("vocabulary", OK, f"{largest + 1} ids, {size} rows")
    ends = end_ids(folder.path, own)
    outside = sorted(end for end in ends if type(end) is not int or not 0 <= end <= largest)
    if not ends or outside:
        text = f"not ids of the tokenizer: {outside}" if ends else "none: answers never end"
        yield Line("end ids", ERROR, text, "set eos_token_id in config.json and generation_config.json")
    elif own.eos_token_id not in _told(folder):
        text = f"the tokenizer ends a turn with {own.eos_token_id}, the configuration with "
        text += f"{sorted(_told(folder), key=str)}"
        yield Line("end ids", WARNING, text, "set eos_token_id in generation_config.json to both")
    else:
        yield Line(
            "end ids", OK, ", ".join(f"{end} {own.convert_ids_to_tokens(end)}" for end in sorted(ends))
        )
    yield from _chat(own)


def _told(folder: Folder) -> set:
    """End ids that the configuration files name; generation_config.json wins if it has some."""
    path = folder.path / "generation_config.json"
    value = (read_json(path) if path.is_file() else {}).get("eos_token_id")
    value = folder.config.get("eos_token_id") if value is None else value
    return set(value if isinstance(value, list) else [value])


def _chat(own) -> Iterator[Line]:
    if not own.chat_template:
        yield Line("chat template", WARNING, "none", "commands that ask questions need one")
        return
    user, answer = {"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>a</think>b"}
    try:
        before = own.apply_chat_template([user, answer], tokenize=False)
        after = own.apply_chat_template([user, answer, user], tokenize=False)
    except Exception as error:  # templates raise what they like
        yield Line("chat template", ERROR, f"fails on two turns: {error}".splitlines()[0])
        return
    notes = [] if takes_system_turn(own) else ["takes no system turn"]
    if not after.startswith(before.rstrip()):
        notes.append("rewrites earlier turns, so only the last turn of a chat is trained")
    yield Line(
        "chat template", WARNING if notes else OK, "; ".join(notes) or "keeps system and earlier turns"
    )
