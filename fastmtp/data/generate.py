"""Answers from a model in this process: batches in plain PyTorch, for a laptop or without an engine."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import torch
from torch import Tensor
from transformers import DynamicCache

from fastmtp.data.journal import Journal, sample
from fastmtp.data.prompts import Chat
from fastmtp.data.rendering import Refused, question_ids
from fastmtp.data.sources import Sampling
from fastmtp.head.modeling_mimo import attention_of
from fastmtp.reference.attention import ATTENTION
from fastmtp.reference.model import Model
from fastmtp.show.progress import Bar

WINDOW = 16384  # prompts held at a time, to be batched with others of like length


def batches(model: Model, chats: Iterable[Chat], size: int) -> Iterator[list[Chat]]:
    """Prompts in groups of at most `size`, of one sampling and like length, so that little is padded; within
    a window the groups are in random order, so that the estimate of the time left is fair and a run cut short
    a fair sample.
    """
    feed = iter(chats)
    while window := list(islice(feed, WINDOW)):
        lengths = {chat.key: _first_length(model, chat) for chat in window}
        window.sort(key=lambda chat: (str(chat.sampling), lengths[chat.key]))
        groups = []
        for _, alike in groupby(window, key=lambda chat: chat.sampling):
            ordered = list(alike)
            groups += [ordered[i : i + size] for i in range(0, len(ordered), size)]
        random.Random(0).shuffle(groups)
        yield from groups


def _first_length(model: Model, chat: Chat) -> int:
    """Tokens of a chat's first prompt, to sort by; 0 for one that cannot be asked, as `answer_batch` will
    find.
    """
    try:
        context = model.net.config.max_position_embeddings
        return len(question_ids(model.tokenizer, chat.parts[0], chat.sampling.max_new_tokens, context))
    except Refused:
        return 0


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next token of each row. logits: [B, V] -> [B] int64. Sorts the top k alone, not the vocabulary."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    values, ids = logits.float().topk(min(sampling.top_k, logits.shape[-1]))
    shares = (values / sampling.temperature).softmax(-1)
    before = shares.cumsum(-1) - shares  # mass in front of each token: the first one is always kept
    shares = shares.masked_fill(before >= sampling.top_p, 0.0)
    return ids.gather(1, torch.multinomial(shares, 1, generator=generator)).squeeze(1)


@torch.inference_mode()
def answer(model: Model, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[list[int]]:
    """Generate for a batch of prompts (token ids); answers end with an end token, or were cut at the limit.

    Rows that have ended leave the batch once they are a quarter of it, so that a few long answers stay cheap.
    """
    net, device = model.net, model.net.lm_head.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = not bool(mask.all())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=net.config)
    outputs: list[list[int]] = [[] for _ in prompts]
    rows, alive = list(range(len(prompts))), [True] * len(prompts)
    while True:
        with attention_of(net.config, ATTENTION):
            states = net.model(
                input_ids=ids,
                attention_mask=mask if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        ids = choose(net.lm_head(states[:, -1]), sampling, generator)[:, None]
        for i, token in enumerate(ids[:, 0].tolist()):
            if alive[i]:
                outputs[rows[i]].append(token)
                alive[i] = token not in model.eos_ids and len(outputs[rows[i]]) < sampling.max_new_tokens
        if not any(alive):
            return outputs
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if sum(alive) <= 0.75 * len(rows):
            keep = [i for i, going in enumerate(alive) if going]
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            ids, mask, positions = ids[index], mask[index], positions[index]
            rows, alive = [rows[i] for i in keep], [True] * len(keep)


def answer_batch(model: Model, chats: list[Chat], seed: int) -> tuple[list[dict], list[tuple[Chat, str]]]:
    """Answer every turn of every chat (all of one sampling), in order -> (samples, refused chats and why)."""
    sampling, context = chats[0].sampling, model.net.config.max_position_embeddings
    said: dict[str, list[dict]] = {chat.key: [] for chat in chats}
    asked: dict[str, list[int]] = {}
    refused: list[tuple[Chat, str]] = []
    left = list(chats)
    for turn in range(max(len(chat.parts) for chat in chats)):
        going = []
        for chat in [chat for chat in left if turn < len(chat.parts)]:
            said[chat.key] += chat.parts[turn]
            try:
                asked[chat.key] = question_ids(
                    model.tokenizer, said[chat.key], sampling.max_new_tokens, context
                )
            except Refused as refusal:
                refused.append((chat, str(refusal)))
                left.remove(chat)
            else:
                going.append(chat)
        if not going:
            continue
        outputs = answer(model, [asked[chat.key] for chat in going], sampling, seed + turn)
        for chat, output in zip(going, outputs, strict=True):
            text = model.tokenizer.decode(output, skip_special_tokens=True)
            said[chat.key].append({"role": "assistant", "content": text, "token_ids": output})
    return [sample(chat, said[chat.key], asked[chat.key], model.eos_ids) for chat in left], refused


def generate(
    model: Model, chats: Iterable[Chat], journal: Journal, batch_size: int, seed: int, bar: Bar
) -> None:
    """Answer all chats that `journal` has no answer for. The same seed gives the same answers, interrupted or
    not.
    """
    for number, batch in enumerate(batches(model, chats, batch_size)):
        if all(chat.key in journal.done for chat in batch):
            continue
        samples, refused = answer_batch(model, batch, seed + 1000 * number)
        done = len(refused)
        for row in samples:
            if row["key"] not in journal.done:
                journal.write(row)
                done += 1
        for chat, reason in refused:
            journal.fail(chat, reason)
        bar.update(done)  # in one go: a rate taken after the first of a batch would be far too low
        bar.set_postfix_str(f"{journal.tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s")
