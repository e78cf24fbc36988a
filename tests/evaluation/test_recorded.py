"""The stand-in speaks as SGLang does: against answers recorded from real servers,
tests/recorded/sglang_VERSION.json.

A recording: `{"version", "plain": {...}, "drafting": {...}}`, each with `model_info`, `server_info`,
`generate` and `chat` (the streamed lines), made with the same requests that evaluation.client and
examples/stream.py send.
"""

import asyncio
import json
from pathlib import Path

import pytest
from helpers.stand_in import StandIn

from evaluation import backends

RECORDINGS = sorted((Path(__file__).parent / "recorded").glob("sglang_*.json"))
PROMPT = [5, 6, 7]


def chunks(lines):
    return [json.loads(line[5:]) for line in lines if line.startswith("data:") and "[DONE]" not in line]


def kinds(value):
    """The shape of a JSON value: keys and types, numbers alike."""
    if isinstance(value, dict):
        return {key: kinds(v) for key, v in value.items()}
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value).__name__
    return "number" if isinstance(value, int | float) else "list"


def differences(ours, theirs, place=""):
    """Fields of ours that the recording lacks or has of another type. null may stand for anything."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            d for key in ours for d in differences(ours[key], theirs.get(key, "missing"), f"{place}.{key}")
        ]
    return [] if ours == theirs or "NoneType" in (ours, theirs) else [f"{place}: {ours}, recorded {theirs}"]


async def ask(url):
    """What the client sends, and the raw lines that come back."""
    sent = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 4},
        "stream": True,
    }  # ends by length, as recorded
    chat = {"model": "default", "messages": [], "stream": True}
    async with backends.Server(url) as server:
        found = {
            "model_info": await server._json("/model_info"),
            "server_info": await server._json("/server_info"),
        }
        for name, path, body in (("generate", "/generate", sent), ("chat", "/v1/chat/completions", chat)):
            async with server.session.post(url + path, json=body) as reply:
                found[name] = (await reply.text()).splitlines()
    return found


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("side", ["plain", "drafting"])
def test_every_field_of_the_stand_in_was_seen_in_a_real_answer(path, side):
    recorded = json.loads(path.read_text())[side]
    with StandIn(num_steps=3 if side == "drafting" else 0) as server:
        ours = asyncio.run(ask(server.url))
    for name in ("model_info", "server_info"):
        assert differences(kinds(ours[name]), kinds(recorded[name]), name) == []
    for name in ("generate", "chat"):
        mine, real = chunks(ours[name]), chunks(recorded[name])
        assert ours[name][-1] == "" or ours[name][-1] == "data: [DONE]"
        assert differences(kinds(mine[0]), kinds(real[0]), f"{name}, first") == []
        assert differences(kinds(mine[-1]), kinds(real[-1]), f"{name}, last") == []
    assert len(chunks(recorded["generate"])) == 2, "one chunk for the first token and one for the end"


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_client_understands_the_recorded_answers(path):
    for side in ("plain", "drafting"):
        recorded = json.loads(path.read_text())[side]
        first, last = (backends._chunk(json.dumps(c).encode(), "u") for c in chunks(recorded["generate"]))
        turn = backends._turn(last, "u", first["meta_info"]["completion_tokens"], 0.1, 0.2, 0.0)
        assert len(turn.output_ids) > 1 and turn.finish in ("stop", "length") and turn.text
        assert (turn.verify_passes is None) == (side == "plain")
        if side == "drafting":
            assert sum(turn.histogram) == turn.verify_passes
            kept = sum((accepted + 1) * count for accepted, count in enumerate(turn.histogram))
            assert kept >= len(turn.output_ids) - 1, "the last pass may accept more than is kept"
