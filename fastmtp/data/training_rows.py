"""One training row: from what a line says to token ids and labels, or the reason why it is left out.

Nothing is guessed. Roles are known ones, contents are texts or exact ids, ids are the model's and spell the
text beside them, the chat template shows the model every turn, and a target is left for the head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from fastmtp.chat import IGNORE, PARTS, check_shown, encode_turns, exact_ids, prompt_ids
from fastmtp.cli import InputError
from fastmtp.data.samples import spells

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SYSTEM = ("system", "system_prompt")
QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution"),
    *("text", "completion", "content"),
)
MEDIA = ("images", "videos", "audios", "image", "video", "audio")
SHAREGPT = {"human": "user", "gpt": "assistant"}
PAIRED, PAIR = ("human", "assistant"), ("user", "assistant")

Sequence = tuple[list[int], list[int]]  # ids and labels


class LeftOut(Exception):
    """Why a row cannot be trained on. Rows with the same words are counted together."""


@dataclass(frozen=True)
class Rules:
    """What a row must keep to. truncation: ms-swift's `delete`, `left` or `right`."""

    vocab_size: int
    max_length: int
    truncation: str = "delete"
    columns: dict[str, str] = field(default_factory=dict)  # the file's column -> query, response, system
    system: str | None = None  # for rows without a system turn
    max_chars: int | None = None  # more than this cannot be max_length tokens, whatever it says


def encode_row(tokenizer, row: dict, rules: Rules) -> list[Sequence]:
    """The sequences of one row: one, or one per answer if the template rewrites earlier turns.

    Raises LeftOut.
    """
    row = {rules.columns.get(name, name): value for name, value in row.items()}
    messages, tools = chat_of(row), tools_of(row)
    if rules.system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": rules.system}, *messages]
    check_texts([messages, tools])
    if rules.max_chars and sum(len(str(message["content"])) for message in messages) > rules.max_chars:
        raise LeftOut(f"longer than max_length {rules.max_length}")  # tokenising it would take minutes
    check_ids(tokenizer, row, messages, rules.vocab_size)
    try:
        sequences = encode_turns(tokenizer, messages, tools)
        check_shown(tokenizer, messages, tools)
        check_prompt(tokenizer, row, messages, tools, sequences[-1][0])
    except InputError as error:
        raise LeftOut(str(error)) from None
    fitting = [cut for cut in (fit(s, rules) for s in sequences) if cut]
    if not fitting:
        raise LeftOut(f"longer than max_length {rules.max_length}")
    useful = [sequence for sequence in fitting if has_target(sequence[1])]
    if not useful:
        raise LeftOut("no target: the head drafts from an answer's second token on")
    return useful


def chat_of(row: dict) -> list[dict]:
    """Messages of a row in any of the forms that ms-swift reads: chat, ShareGPT, prompt and response."""
    media = next((name for name in MEDIA if row.get(name)), None)
    if media:
        raise LeftOut(f"it has {media}, and the model reads text alone")
    for name in ("messages", "conversations", "conversation"):
        if row.get(name) is not None:
            messages = row[name]
            break
    else:
        return _pair(row)
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise LeftOut("its messages are not a list of objects")
    messages = [_message(message) for pair in messages for message in _unpaired(pair)]
    system = _first(row, SYSTEM)
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": _string(system, "system")}, *messages]
    output, last = row.get("output_ids"), messages[-1]
    if output is not None and last["role"] == "assistant":  # a distilled row: its answer's exact ids
        if exact_ids(last) is None:
            messages[-1] = last = last | {"token_ids": output}
        if exact_ids(last) != output:
            raise LeftOut("output_ids are not the last answer's token_ids")
    return messages


def _unpaired(message: dict) -> list[dict]:
    """ms-swift's older form of ShareGPT holds a question and its answer in one object."""
    if "human" not in message or "assistant" not in message:
        return [message]
    return [{"role": role, "content": message[name]} for role, name in zip(PAIR, PAIRED, strict=True)]


def _message(message: dict) -> dict:
    role = message.get("role", message.get("from"))
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise LeftOut(f"unknown role {json.dumps(role)[:40]}; known are {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    ids_alone = isinstance(content, dict) and isinstance(content.get("token_ids"), list)
    parts = role == "assistant" and any(message.get(part) for part in PARTS)
    if content is None and parts:
        content = ""
    if not isinstance(content, str) and not (ids_alone and role == "assistant"):
        raise LeftOut(f"the content of the '{role}' turn is not a text ({type(content).__name__})")
    if not isinstance(message.get("loss"), bool | None):
        raise LeftOut(f"'loss' must be true or false, not {json.dumps(message['loss'])[:40]}")
    if message.get("loss_scale") not in (None, 1):
        raise LeftOut("'loss_scale' in a turn; mark a turn that is not to be learnt with \"loss\": false")
    if ids_alone and message.get("token_ids") not in (None, content["token_ids"]):
        raise LeftOut("two lists of token_ids in one turn")
    if message.get("token_ids") is not None and role != "assistant":
        raise LeftOut(f"token_ids in a '{role}' turn; only answers have exact ids")
    result = message | {"role": role, "content": content}
    if message.get("tool_calls"):
        result["tool_calls"] = [_call(call) for call in _objects(message["tool_calls"], "tool_calls")]
    return result


def _call(call: dict) -> dict:
    """A tool call with its arguments as an object, as templates want it; OpenAI's API gives a JSON string."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return call
        if isinstance(arguments, dict):
            return call | {"function": function | {"arguments": arguments}}
    return call


def _pair(row: dict) -> list[dict]:
    """Messages of a row that holds a prompt and a response in columns."""
    query = _first(row, QUERY)
    if row.get("instruction") and row.get("input"):  # Alpaca's pair of columns is one prompt
        query = f"{_string(row['instruction'], 'instruction')}\n{_string(row['input'], 'input')}"
    response, history = _first(row, RESPONSE), row.get("history") or []
    if query is None or response is None:
        raise LeftOut("it has neither 'messages' nor a prompt with its response; see the key 'columns'")
    if not isinstance(history, list) or not all(isinstance(h, list) and len(h) == 2 for h in history):
        raise LeftOut("'history' is not a list of pairs")
    system = _first(row, SYSTEM)
    messages = [{"role": "system", "content": _string(system, "system")}] if system is not None else []
    for asked, answered in [*history, (query, response)]:
        messages += [
            {"role": "user", "content": _string(asked, "prompt")},
            {"role": "assistant", "content": _string(answered, "response")},
        ]
    return messages


def tools_of(row: dict) -> list[dict] | None:
    tools = row.get("tools")
    if row.get("functions"):
        raise LeftOut("it has 'functions'; give them as 'tools'")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError:
            raise LeftOut("'tools' is a text that is not JSON") from None
    return _objects(tools, "tools") if tools else None


def check_texts(value: object) -> None:
    """LeftOut for half an emoji (a lone surrogate) in any text: no tokenizer takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise LeftOut("half an emoji (a lone surrogate) in a text") from None


def check_ids(tokenizer, row: dict, messages: list[dict], vocab_size: int) -> None:
    """LeftOut unless exact ids are the model's, and spell the text beside them."""
    for message in messages:
        ids = exact_ids(message)
        if ids is None:
            continue
        _check_range(ids, vocab_size)
        text = message["content"] if isinstance(message["content"], str) else message["content"].get("text")
        if isinstance(text, str) and (text or "content" in message):
            if not spells(tokenizer, ids, text):
                raise LeftOut("token_ids spell other text than the content; they are another tokenizer's")
    if row.get("prompt_ids") is not None:
        _check_range(row["prompt_ids"], vocab_size)


def check_prompt(tokenizer, row: dict, messages: list[dict], tools, encoded: list[int]) -> None:
    """LeftOut if the `prompt_ids` of a distilled row are not the prompt of its last answer.

    encoded: the ids of the last answer's sequence. If they are prompt and answer, nothing is tokenised again.
    """
    ids = row.get("prompt_ids")
    if ids is None or messages[-1]["role"] != "assistant":
        return
    if encoded == [*ids, *(exact_ids(messages[-1]) or [])]:
        return
    own = prompt_ids(tokenizer, messages[:-1], tools)
    if ids != own and _spelt(tokenizer, ids, False) != _spelt(tokenizer, own, False):
        raise LeftOut("prompt_ids spell another prompt than the messages; distil with this model")


def fit(sequence: Sequence, rules: Rules) -> Sequence | None:
    """A sequence of at most max_length tokens; None if it is too long and must be left out."""
    ids, labels = sequence
    if len(ids) <= rules.max_length:
        return sequence
    if rules.truncation == "right":
        return ids[: rules.max_length], labels[: rules.max_length]
    return (ids[-rules.max_length :], labels[-rules.max_length :]) if rules.truncation == "left" else None


def has_target(labels: list[int]) -> bool:
    """Whether step 1 has a target (`losses.step_targets`): the engine drafts after a token of the answer, so
    an answer needs two.
    """
    return any(a != IGNORE != b for a, b in zip(labels[1:], labels[2:], strict=False))


def _check_range(ids: object, vocab_size: int) -> None:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise LeftOut("token ids that are not whole numbers")
    if not all(0 <= token < vocab_size for token in ids):
        raise LeftOut(f"token ids outside the model's {vocab_size} tokens; distil with this model")


def _first(row: dict, names: tuple[str, ...]) -> object:
    values = [row[name] for name in names if row.get(name) is not None]
    return next(filter(None, values), values[0] if values else None)  # an empty one only if all are


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise LeftOut(f"its {name} is not a text ({type(value).__name__})")
    return value


def _objects(value: object, name: str) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise LeftOut(f"'{name}' is not a list of objects")
    return value


def _spelt(tokenizer, ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False).strip()
