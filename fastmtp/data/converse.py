"""Many chats at once against servers: every answer of a chat in order, each chat one sample or one failure.

A fixed number of workers draw from the one stream of prompts, so that as many chats are in flight and no more
are held in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from tqdm import tqdm

from fastmtp.chat import prompt_ids
from fastmtp.data.journal import Journal, sample, too_long
from fastmtp.data.prompts import Chat
from fastmtp.data.servers import Refused, Servers
from fastmtp.engines.process import ServerError

PATIENCE = 50  # failures in a row, beyond the chats in flight, that mean the servers are gone


async def converse(chat: Chat, servers: Servers, context: int) -> dict:
    """One chat from its first prompt to its last answer -> sample. Raises Refused."""
    messages: list[dict] = []
    retokenised = False
    for part in chat.parts:
        messages += part
        ids = prompt_ids(servers.tokenizer, messages)
        if reason := too_long(len(ids), chat.sampling, context):
            raise Refused(reason)
        answer = await servers.ask(ids, messages, chat.sampling)
        text = servers.tokenizer.decode(answer.ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text, "token_ids": answer.ids})
        retokenised |= answer.retokenised
    made = sample(chat, messages, answer.prompt_ids or ids, servers.eos_ids)
    return made | ({"retokenised": True} if retokenised else {})


async def converse_all(
    chats: Iterable[Chat], servers: Servers, context: int, in_flight: int, journal: Journal, bar: tqdm
) -> None:
    """Answer all chats that `journal` has no answer for. Raises ServerError when nothing but failures comes
    back.
    """
    feed = iter(chats)
    in_a_row = 0

    async def worker() -> None:
        nonlocal in_a_row
        for chat in feed:
            if chat.key in journal.done:
                continue
            try:
                made = await converse(chat, servers, context)
            except Refused as refusal:
                journal.fail(chat, str(refusal))
                in_a_row += 1
                if in_a_row >= in_flight + PATIENCE:
                    raise ServerError(
                        f"{in_a_row} prompts in a row got no answer; the last: {refusal}"
                    ) from None
            else:
                journal.write(made)
                in_a_row = 0
            rate = journal.tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update()

    workers = [asyncio.create_task(worker()) for _ in range(in_flight)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
