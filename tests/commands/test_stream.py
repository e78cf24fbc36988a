"""The streaming example against a stand-in."""

import importlib.util
from pathlib import Path

import pytest
from helpers.stand_in import StandIn

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
