"""How we speak HTTP to a server: sessions and connections (addresses and keys: `address`). Shared by distillation and evaluation.

Needs aiohttp, which comes with `pip install -e '.[serve]'`.
"""

from __future__ import annotations

import aiohttp

from fastmtp.engines.address import api_key as api_key
from fastmtp.engines.address import base_url as base_url
from fastmtp.engines.address import check_port as check_port

# uvicorn closes a connection that was idle for 5 s. The client must give it up earlier, or a request may be
# sent into a connection that is about to close.
KEEPALIVE = 3
RECONNECTS = 2
CLOSED = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError, BrokenPipeError)


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
