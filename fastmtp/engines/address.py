"""Where a server listens and what opens it: hosts, ports, keys. Needs nothing but Python."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from fastmtp.cli import InputError

HOST = "127.0.0.1"
ANY = {"0.0.0.0": HOST, "::": "::1"}  # a server that listens everywhere is asked on this machine


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


def is_url(text: str) -> bool:
    """Whether a text is an HTTP address with a host, and a port that can be one if it has a port."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def check_port(port: int, count: int = 1) -> None:
    """InputError unless `port` and the `count` - 1 ports after it can be ports."""
    if not 1 <= port <= 65536 - count:
        raise InputError(f"--port {port}: must be between 1 and {65536 - count}")


def api_key(value: str | None) -> str | None:
    """The key given, or the one in OPENAI_API_KEY; None if there is none."""
    return value or os.environ.get("OPENAI_API_KEY") or None


def check_host(host: str, port: int) -> None:
    """InputError unless a server can listen on `host`: an address, or a name that is known here."""
    try:
        if not host:
            raise OSError
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(f"--host {host}: not an address or a known name; try 127.0.0.1 or ::1") from None
