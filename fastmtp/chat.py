"""Chats to token ids, in one place: what the model was asked, what it answered, and which tokens are answers.

A message is `{"role", "content"}`; an assistant message may carry its exact tokens, as `"token_ids": [...]`
or in ms-swift's form `"content": {"token_ids": [...]}`, and then nothing is tokenised again. Prompts go
through the tokenizer's own chat template, cut at render boundaries, so that masks never depend on a pattern
in the text.
"""

from __future__ import annotations

from fastmtp.cli import InputError

IGNORE = -100


def prompt_ids(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of `messages` followed by the template's generation prompt.

    Earlier answers keep their exact `token_ids`, as in `encode_chat`, unless the template rewrites earlier
    turns.
    """
    rendered = _render(tokenizer, messages, prompt=True)
    ids, done = [], ""
    for turn, message in enumerate(messages):
        if message.get("token_ids") is not None:
            prompt = _render(tokenizer, messages[:turn], prompt=True)
            if not prompt.startswith(done):
                return _ids(tokenizer, rendered)
            answer = answer_ids(tokenizer, message)
            ids += _ids(tokenizer, prompt[len(done) :]) + answer
            done = prompt + tokenizer.decode(
                answer, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
    if not rendered.startswith(done):
        return _ids(tokenizer, rendered)
    return ids + _ids(tokenizer, rendered[len(done) :])


def encode_chat(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Whole chat -> (ids, labels), equally long; labels are the ids of assistant tokens, IGNORE elsewhere.

    Each answer ends with the end-of-turn token unless its exact `token_ids` say otherwise; one with `"loss":
    false` (ms-swift's mark of a turn given with the prompt) is not learnt. Raises InputError when there is no
    assistant turn or the template rewrites earlier turns (then train on single turns).
    """
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:turn], prompt=True)
        if not prompt.startswith(done):
            raise InputError("the chat template rewrites earlier turns; split this chat into single turns")
        gap = _ids(tokenizer, prompt[len(done) :])
        answer = answer_ids(tokenizer, message)
        ids += gap + answer
        learnt = message.get("loss", True)
        labels += [IGNORE] * len(gap) + (answer if learnt else [IGNORE] * len(answer))
        done = prompt + tokenizer.decode(
            answer, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    if not labels:
        raise InputError("the chat has no assistant turn")
    return ids, labels


def answer_ids(tokenizer, message: dict) -> list[int]:
    """Token ids of one assistant message, its end-of-turn token included."""
    content = message["content"]
    exact = content.get("token_ids") if isinstance(content, dict) else message.get("token_ids")
    if exact is not None:
        return list(exact)
    return _ids(tokenizer, content) + [tokenizer.eos_token_id]


def answer_text(tokenizer, message: dict) -> str:
    """Text of a message; exact tokens are decoded without the special ones."""
    content = message["content"]
    if isinstance(content, dict):
        return tokenizer.decode(content["token_ids"], skip_special_tokens=True)
    return content


def _render(tokenizer, messages: list[dict], prompt: bool) -> str:
    plain = [{"role": m["role"], "content": answer_text(tokenizer, m)} for m in messages]
    return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
