"""Many chats at once against servers: every answer of a chat in order, each chat one sample or one failure.

A fixed number of workers draw from the one stream of prompts, so that as many chats are in flight and no more
are held in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from fastmtp.data.journal import Journal, sample
from fastmtp.data.prompts import Chat
from fastmtp.data.rendering import Refused, question_ids
from fastmtp.data.servers import Servers
from fastmtp.engines.client import together
from fastmtp.engines.process import ServerError
from fastmtp.show.progress import Bar

PATIENCE = 50  # prompts in a row that no server answered, beyond the chats in flight: the servers are gone


async def converse(chat: Chat, servers: Servers) -> dict:
    """One chat from its first prompt to its last answer -> sample. Raises Refused."""
    messages: list[dict] = []
    retokenised = False
    for part in chat.parts:
        messages += part
        ids = question_ids(servers.tokenizer, messages, chat.sampling.max_new_tokens, servers.context)
        answer = await servers.ask(ids, messages, chat.sampling)
        text = servers.tokenizer.decode(answer.ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text, "token_ids": answer.ids})
        retokenised |= answer.retokenised
    row = sample(chat, messages, answer.prompt_ids or ids, servers.eos_ids)
    return row | ({"retokenised": True} if retokenised else {})


async def converse_all(
    chats: Iterable[Chat], servers: Servers, in_flight: int, journal: Journal, bar: Bar
) -> None:
    """Answer all chats that `journal` has no answer for. Raises ServerError if no server answers any more."""
    feed = iter(chats)
    unanswered = 0  # in a row; a prompt that is refused says nothing about the servers

    async def worker() -> None:
        nonlocal unanswered
        for chat in feed:
            if chat.key in journal.done:
                continue
            try:
                row = await converse(chat, servers)
            except Refused as refusal:
                journal.fail(chat, str(refusal))
                unanswered += refusal.gone
                if unanswered >= in_flight + PATIENCE:
                    raise ServerError(
                        f"{unanswered} prompts in a row got no answer; the last: {refusal}"
                    ) from None
                await asyncio.sleep(0)  # refusals without a request must not hold up the answers
            else:
                journal.write(row)
                unanswered = 0
            rate = journal.tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update()

    await together(worker() for _ in range(in_flight))
