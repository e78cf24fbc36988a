"""One reader for chats that people hand us: a list of `{"role", "content"}`, every content a text.

Tool use is refused with the line. The distiller writes every answer anew, so the results of earlier tool
calls would no longer fit; and a template that does not know a role leaves its message out without a word.
"""

from __future__ import annotations

from fastmtp.cli import InputError

ROLES = ("system", "user", "assistant")
TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
MEDIA_KEYS = ("images", "videos", "audios")


def row_messages(row: dict, place: str) -> list[dict]:
    """The checked messages of a row: its `messages`, or one user turn from its `prompt`.

    Raises InputError, starting with `place`, for a row without a prompt or with one that is not a chat of
    texts.
    """
    refuse_unread(row, place)
    messages = row.get("messages")
    if messages is None or messages == []:
        prompt = row.get("prompt")
        if prompt is None or prompt == "":
            raise InputError(f"{place}: no prompt; give `messages` or a non-empty `prompt`")
        if not isinstance(prompt, str):
            raise InputError(
                f"{place}: `prompt` must be a text, not {_kind(prompt)}; fix or remove this line"
            )
        messages = [{"role": "user", "content": prompt}]
    return check_messages(messages, place)


def check_messages(messages: object, place: str) -> list[dict]:
    """`messages`, known to be a list of chat turns whose contents are texts. Raises InputError otherwise."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{place}: `messages` must be a list of {{role, content}}; fix or remove this line")
    for number, message in enumerate(messages):
        check_message(message, f"{place}: message {number}")
    return messages


def check_message(message: dict, place: str) -> None:
    """InputError for a turn of another role, without a text, or with more in it than a text."""
    role, content = message.get("role"), message.get("content")
    refuse_unread(message, place)
    if role not in ROLES:
        hint = "; tool use is not supported" if role in ("tool", "function") else ""
        raise InputError(
            f"{place} has the role {role!r}, expected {', '.join(ROLES)}{hint}; remove this line"
        )
    if not isinstance(content, str):
        raise InputError(f"{place} needs a text as 'content', not {_kind(content)}; fix or remove this line")
    if role == "user" and not content.strip():
        raise InputError(f"{place}: an empty user message; fix or remove this line")
    check_text(content, place)


def check_text(text: str, place: str) -> None:
    """InputError for half of a surrogate pair, which no file in UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{place}: text that is not valid UTF-8; fix or remove this line") from None


def refuse_unread(row: dict, place: str) -> None:
    """InputError for something that is part of the question and that nothing here would pass on."""
    for name in (*TOOL_KEYS, *MEDIA_KEYS):
        if row.get(name):
            raise InputError(f"{place}: `{name}` is not supported; remove it or this line")


def text_field(row: dict, name: str, place: str) -> str | None:
    """A field that names something, as a text: numbers are written out, null is as good as absent."""
    value = row.get(name)
    if value is None or value != value:  # NaN is what tables write for null
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(f"{place}: '{name}' must be a text, not {_kind(value)}; fix or remove this line")
    check_text(str(value), f"{place}: '{name}'")
    return str(value)


def check_ids(ids: object, name: str, place: str, vocab_size: int = 1 << 31) -> list[int]:
    """`ids`, known to be a list of whole numbers from 0 to vocab_size - 1. InputError if it is not."""
    if not isinstance(ids, list):
        raise InputError(f"{place}: '{name}' must be a list of token ids, not {_kind(ids)}; fix this line")
    for value in ids:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise InputError(
                f"{place}: '{name}' holds {value!r:.40}, which is no token id below {vocab_size}; "
                "fix this line, or distil with this model"
            )
    return ids


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
