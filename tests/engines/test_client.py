"""Addresses, ports and keys of servers."""

import asyncio

import pytest

from fastmtp.cli import InputError
from fastmtp.engines import address, client


@pytest.mark.parametrize(
    "host, url",
    [
        ("127.0.0.1", "http://127.0.0.1:30000"),
        ("http://127.0.0.1", "http://127.0.0.1:30000"),
        ("::1", "http://[::1]:30000"),
        ("[fe80::2]", "http://[fe80::2]:30000"),
        ("http://[::1]", "http://[::1]:30000"),
        ("localhost:31000/", "http://localhost:31000"),
        ("https://gate.example/models", "https://gate.example:30000/models"),
    ],
)
def test_a_host_becomes_a_url(host, url):
    assert address.base_url(host, 30000) == url


@pytest.mark.parametrize("host", ["", "a b", "ftp://name", "1:2:3", "http://", "[::1"])
def test_what_is_no_host_is_refused(host):
    with pytest.raises(InputError, match="--host .*not a host name or address"):
        address.base_url(host, 30000)


def test_ports_out_of_range_are_refused():
    address.check_port(65532, 4)
    for port, count in ((0, 1), (-5, 1), (65536, 1), (65533, 4)):
        with pytest.raises(InputError, match=f"--port {port}: must be between 1 and {65536 - count}"):
            address.check_port(port, count)


def test_the_key_given_goes_before_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    assert address.api_key("given") == "given" and address.api_key(None) == "from-the-environment"
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert address.api_key(None) is None


def test_idle_connections_are_given_up_before_uvicorn_closes_them_and_proxies_are_not_used():
    async def made():
        async with client.session(1.0) as session:
            assert session.connector._keepalive_timeout < 5 and not session.trust_env

    asyncio.run(made())


@pytest.mark.parametrize(
    "url", ["http://", "http://127.0.0.1:70000", "http://h:0", "ftp://h", "h:30000", "http://h:x"]
)
def test_what_is_no_url_is_known_before_it_is_asked(url):
    assert not address.is_url(url)
    assert address.is_url("http://[::1]:30000/v1") and address.is_url("https://host")
