"""The streaming example against a stand-in."""

import importlib.util
from pathlib import Path

import pytest
from helpers.stand_in import Handler, StandIn

pytest.importorskip("openai")
spec = importlib.util.spec_from_file_location("stream", Path(__file__).parents[2] / "examples" / "stream.py")
stream = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stream)


def test_the_answer_is_printed_as_it_comes_with_its_speed(capsys):
    with StandIn() as server:
        stream.main(["what is red", "--url", server.url + "/v1"])
    printed = capsys.readouterr()
    assert printed.out == "red green\n" and printed.err.startswith("[3 tokens, first after ")


def test_no_server_is_one_line():
    with StandIn() as server:
        pass
    with pytest.raises(SystemExit) as caught:
        stream.main(["hello", "--url", server.url + "/v1"])
    assert "is the server running?" in str(caught.value.code)


def test_a_server_on_this_machine_is_asked_past_a_proxy_and_with_the_key(capsys, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    keys = []
    original = Handler.do_POST
    monkeypatch.setattr(
        Handler, "do_POST", lambda h: keys.append(h.headers.get("Authorization")) or original(h)
    )
    with StandIn() as server:
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            stream.main(["what is red", "--url", url + "/v1", "--api-key", "sesame"])
        monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
        stream.main(["what is red", "--url", server.url + "/v1"])
    assert keys == ["Bearer sesame"] * 2 + ["Bearer from-the-environment"]
    assert capsys.readouterr().out == "red green\n" * 3
