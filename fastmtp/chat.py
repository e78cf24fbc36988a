"""Chats to token ids, in one place: what the model was asked, what it answered, and which tokens are answers.

A message is `{"role", "content"}`; an assistant message may carry its exact tokens, as `"token_ids": [...]`
or in ms-swift's form `"content": {"token_ids": [...]}`, and then nothing is tokenised again. Prompts go
through the tokenizer's own chat template, cut at render boundaries, so that masks never depend on a pattern
in the text.
"""

from __future__ import annotations

from fastmtp.cli import InputError

IGNORE = -100
# What a message may say beside its content. The template decides how a model reads or writes it.
CALLS = ("tool_calls", "function_call")
PARTS = (*CALLS, "reasoning_content", "reasoning", "thinking")


class TemplateError(InputError):
    """The chat template refuses a chat, or does not show the model all of it."""


def prompt_ids(tokenizer, messages: list[dict], tools: list | None = None) -> list[int]:
    """Token ids of `messages` followed by the template's generation prompt.

    Earlier answers keep their exact tokens, as in `encode_chat`, unless the template rewrites earlier turns.
    """
    rendered = _render(tokenizer, messages, tools)
    ids, done = [], ""
    for turn, message in enumerate(messages):
        if exact_ids(message) is not None:
            prompt = _render(tokenizer, messages[:turn], tools)
            if not prompt.startswith(done):
                return _ids(tokenizer, rendered)
            answer = answer_ids(tokenizer, message)
            ids += _ids(tokenizer, prompt[len(done) :]) + answer
            done = prompt + _text(tokenizer, answer)
    if not rendered.startswith(done):
        return _ids(tokenizer, rendered)
    return ids + _ids(tokenizer, rendered[len(done) :])


def encode_chat(tokenizer, messages: list[dict], tools: list | None = None) -> tuple[list[int], list[int]]:
    """Whole chat -> (ids, labels), equally long; labels are the ids of assistant tokens, IGNORE elsewhere.

    The last of `encode_turns`: if the template rewrites earlier turns, only the last answer is labelled.
    """
    return encode_turns(tokenizer, messages, tools)[-1]


def encode_turns(
    tokenizer, messages: list[dict], tools: list | None = None
) -> list[tuple[list[int], list[int]]]:
    """Whole chat -> one (ids, labels), or one per answer if the template rewrites earlier turns.

    A template that trims or opens earlier turns shows the model another history at each turn, so each answer
    follows the prompt that an engine would build for it. An answer ends with the end-of-turn token unless its
    exact `token_ids` say otherwise; one with `"loss": false` (ms-swift's mark of a turn given with the
    prompt) is not learnt. Raises InputError without an assistant turn, TemplateError if the template refuses.
    """
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError("the chat has no assistant turn")
    if turns[0] == 0:
        raise InputError("the chat begins with an answer")
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for turn in turns:
        prompt = _render(tokenizer, messages[:turn], tools)
        if not prompt.startswith(done):
            return _encode_each(tokenizer, messages, tools, turns)
        gap = _ids(tokenizer, prompt[len(done) :])
        answer = _answer(tokenizer, messages[: turn + 1], prompt, tools)
        ids += gap + answer
        labels += [IGNORE] * len(gap) + (answer if learnt(messages[turn]) else [IGNORE] * len(answer))
        done = prompt + _text(tokenizer, answer)
    return [(ids, labels)]


def _encode_each(tokenizer, messages, tools, turns) -> list[tuple[list[int], list[int]]]:
    """One (ids, labels) per learnt answer, each after its own prompt."""
    sequences = []
    for turn in [turn for turn in turns if learnt(messages[turn])] or turns[-1:]:
        prompt = prompt_ids(tokenizer, messages[:turn], tools)
        answer = _answer(tokenizer, messages[: turn + 1], _render(tokenizer, messages[:turn], tools), tools)
        labels = answer if learnt(messages[turn]) else [IGNORE] * len(answer)
        sequences.append((prompt + answer, [IGNORE] * len(prompt) + labels))
    return sequences


def learnt(message: dict) -> bool:
    """Whether an assistant message is a target; `"loss": null` says nothing and counts as not given."""
    return message.get("loss") is not False


def exact_ids(message: dict) -> list[int] | None:
    """The exact tokens that a message carries, if any."""
    content = message.get("content")
    return content.get("token_ids") if isinstance(content, dict) else message.get("token_ids")


def answer_ids(tokenizer, message: dict) -> list[int]:
    """Token ids of one assistant message, its end-of-turn token included."""
    exact = exact_ids(message)
    if exact is not None:
        return list(exact)
    return _ids(tokenizer, message["content"]) + [tokenizer.eos_token_id]


def answer_text(tokenizer, message: dict) -> str:
    """Text of a message; exact tokens are decoded without the special ones."""
    content = message["content"]
    if isinstance(content, dict):
        return tokenizer.decode(content["token_ids"], skip_special_tokens=True)
    return content


def check_shown(tokenizer, messages: list[dict], tools: list | None = None) -> None:
    """TemplateError if the template leaves out a turn, a part of one (PARTS), or the tools.

    The prompt before each answer must change if one of the turns since the answer before it changes. That the
    text occurs in the prompt would prove nothing: an answer often repeats it.
    """
    start = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:turn], tools)
        for n in range(start, turn):
            other = messages[n] | {"content": f"{messages[n].get('content') or ''} 9x"}
            if not _changes(tokenizer, prompt, [*messages[:n], other, *messages[n + 1 : turn]], tools):
                raise TemplateError(f"the chat template leaves out a '{messages[n]['role']}' turn")
        whole = None
        for part in PARTS if exact_ids(message) is None else ():
            if message.get(part) and (learnt(message) or part in CALLS):
                whole = whole or _render(tokenizer, messages[: turn + 1], tools, prompt=False)
                other = {key: value for key, value in message.items() if key != part}
                if not _changes(tokenizer, whole, [*messages[:turn], other], tools, prompt=False):
                    raise TemplateError(f"the chat template leaves out an answer's '{part}'")
        if tools and not start and not _changes(tokenizer, prompt, messages[:turn], None):
            raise TemplateError("the chat template leaves out the tools")
        start = turn + 1


def _changes(tokenizer, rendered: str, messages: list[dict], tools, prompt: bool = True) -> bool:
    try:
        return _render(tokenizer, messages, tools, prompt) != rendered
    except TemplateError:  # it cannot do without
        return True


def _answer(tokenizer, messages: list[dict], prompt: str, tools) -> list[int]:
    """Token ids of the last message, an answer to `prompt`, as the model would write it.

    Calls and reasoning are written by the template. A generation prompt that opens a tag (`<think>`) has
    written the tag for the model: a text that begins with it goes on behind it.
    """
    message = messages[-1]
    if exact_ids(message) is not None:
        return answer_ids(tokenizer, message)
    if any(message.get(part) for part in PARTS):
        whole = _render(tokenizer, messages, tools, prompt=False)
        if not whole.startswith(prompt):
            raise TemplateError("the chat template writes this answer elsewhere than after its own prompt")
        text = whole[len(prompt) :]
        cut = text.rfind(tokenizer.eos_token)
        return _ids(tokenizer, text[:cut] if cut >= 0 else text.rstrip()) + [tokenizer.eos_token_id]
    text = message["content"]
    tag = prompt[prompt.rfind("<") :] if "<" in prompt else ""
    if tag and text.startswith(tag.strip()):
        text = text.removeprefix(tag) if text.startswith(tag) else text[len(tag.strip()) :]
    return _ids(tokenizer, text) + [tokenizer.eos_token_id]


def _render(tokenizer, messages: list[dict], tools: list | None = None, prompt: bool = True) -> str:
    shown = []
    for message in messages:
        parts = {key: message[key] for key in (*PARTS, "name", "tool_call_id") if message.get(key)}
        shown.append({"role": message["role"], "content": answer_text(tokenizer, message), **parts})
    try:
        return tokenizer.apply_chat_template(
            shown, tools=tools or None, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # a template is a program: it may divide by zero
        if not tokenizer.chat_template:
            raise TemplateError("the tokenizer has no chat template; add one") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TemplateError(f"the chat template refuses this chat ({reason})") from None


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
