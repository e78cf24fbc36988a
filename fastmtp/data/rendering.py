"""From a chat to the token ids that the model is asked, or the reason why it cannot be asked.

A chat template is a program that came with the model: it may refuse a system turn or an order of roles, fail
in any way that Jinja can fail, or leave a message out without a word. None of it may end a run of a million
prompts, and none of it may change the question.
"""

from __future__ import annotations

from fastmtp.chat import TemplateError, prompt_ids
from fastmtp.cli import InputError

LONGEST_TOKEN = 256  # characters: a text with more than this per token of the context needs no counting


class Refused(Exception):
    """No answer to this prompt. The message is the reason.

    gone: the server did not answer at all, after all attempts.
    """

    def __init__(self, reason: str, gone: bool = False):
        super().__init__(reason)
        self.gone = gone


def check_template(tokenizer, model: str) -> None:
    """InputError for a model without a chat template, which could not be asked a single prompt."""
    if not tokenizer.chat_template:
        raise InputError(f"{model}: the tokenizer has no chat template; add one to tokenizer_config.json")


def question_ids(tokenizer, messages: list[dict], answer: int, context: int | None) -> list[int]:
    """Token ids of `messages` and the generation prompt.

    Raises Refused if the template refuses them or leaves one out, or if an answer of `answer` tokens does not
    fit behind them into the context (None: unknown).
    """
    size = sum(len(message["content"]) for message in messages)
    if context and size > LONGEST_TOKEN * context:
        raise Refused(f"has {size} characters, far more than the model's context of {context} tokens")
    try:
        ids = prompt_ids(tokenizer, messages)
        lost = _left_out(tokenizer, messages)
    except TemplateError as error:
        raise Refused(f"cannot be asked: {error}") from None
    except Exception as error:  # the template's own words, whatever kind of error it chose
        raise Refused(f"cannot be asked: the chat template fails ({_one_line(error)})") from None
    if lost is not None:
        raise Refused(f"has a {messages[lost]['role']} message that the chat template leaves out")
    if not ids:
        raise Refused("comes to no token in the chat template")
    if context and len(ids) > context - answer:
        room = f"context leaves {context - answer} beside an answer of {answer}"
        raise Refused(f"has {len(ids)} tokens, the model's {room}; shorten it")
    return ids


def _left_out(tokenizer, messages: list[dict]) -> int | None:
    """Place of a message that makes no difference to the rendered prompt, None if all do."""
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]

    def render(chat: list[dict]) -> str:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    text = render(plain)
    for number, message in enumerate(plain):
        content = message["content"].strip()
        if message["role"] == "assistant" or not content or content in text:
            continue
        other = message | {"content": f"{message['content']} 9x"}
        if render([*plain[:number], other, *plain[number + 1 :]]) == text:
            return number
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
