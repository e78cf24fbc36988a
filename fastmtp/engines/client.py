"""How we speak HTTP to a server: sessions, connections, many requests. Shared by distillation and evaluation.

Needs aiohttp, which comes with `pip install -e '.[serve]'`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

import aiohttp

# uvicorn closes a connection that was idle for 5 s. The client must give it up earlier, or a request may be
# sent into a connection that is about to close.
KEEPALIVE = 3
RECONNECTS = 2


def session(timeout: float, key: str | None = None, line: int = 1 << 20) -> aiohttp.ClientSession:
    """A session for requests that take up to `timeout` seconds and stream lines of up to `line` bytes.

    Proxies in the environment are not used: our servers are on this machine or in its network.
    """
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE),
        read_bufsize=line,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        trust_env=False,
    )


async def post(session: aiohttp.ClientSession, url: str, body: dict | None = None) -> aiohttp.ClientResponse:
    """POST, as JSON if there is a body. A connection that was closed before anything came back is made anew:
    the server closed it while it was idle. Use it as `async with await post(...) as reply:`.
    """
    for last in (False,) * RECONNECTS + (True,):
        try:
            return await session.post(url, json=body)
        except aiohttp.ClientConnectorError:
            raise  # nobody listens
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if last:
                raise


async def together(requests: Iterable[Coroutine[Any, Any, Any]]) -> list:
    """Results of all, in order. If one fails or the caller is cancelled, none of the others runs on."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
