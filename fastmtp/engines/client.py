"""How we speak HTTP to a server: addresses, keys, connections. Shared by distillation and evaluation.

Needs aiohttp, which comes with `pip install -e '.[serve]'`.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import aiohttp

from fastmtp.cli import InputError

# uvicorn closes a connection that was idle for 5 s. The client must give it up earlier, or a request may be
# sent into a connection that is about to close.
KEEPALIVE = 3
RECONNECTS = 2
CLOSED = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError, BrokenPipeError)


def base_url(host: str, port: int) -> str:
    """`127.0.0.1`, `::1`, `http://name` or `http://name:30001` -> a URL without a slash at its end.

    A port in `host` wins. Raises InputError for a host that is none.
    """
    check_port(port)
    scheme, separator, rest = host.strip().rpartition("://")
    if rest.count(":") > 1 and "[" not in rest:
        rest = f"[{rest.rstrip('/')}]"  # a bare IPv6 address
    url = f"{scheme or 'http'}://{rest.rstrip('/')}"
    try:
        parts = urlsplit(url)
        named = parts.port
    except ValueError as error:
        raise InputError(f"--host {host}: not a host name or address ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or any(map(str.isspace, url)):
        raise InputError(f"--host {host}: not a host name or address; give one such as 127.0.0.1 or ::1")
    if named is not None:
        return url
    return parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{port}").geturl()


def check_port(port: int, count: int = 1) -> None:
    """InputError unless `port` and the `count` - 1 ports after it can be ports."""
    if not 1 <= port <= 65536 - count:
        raise InputError(f"--port {port}: must be between 1 and {65536 - count}")


def api_key(value: str | None) -> str | None:
    """The key given, or the one in OPENAI_API_KEY; None if there is none."""
    return value or os.environ.get("OPENAI_API_KEY") or None


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
