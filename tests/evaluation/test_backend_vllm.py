"""vLLM's accept counts, per answer and from counters, and wrong answers (a stand-in on loopback)."""

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from evaluation.backend_vllm import Passes, VllmServer
from evaluation.backends import BackendError


@pytest.mark.parametrize(
    "histogram, last, tokens, kept",
    [
        ([2, 1, 0, 1], 0, 9, [2, 1, 0, 1]),  # 1 + 2 + 2 + 4 tokens: all kept
        ([2, 1, 0, 1], 3, 8, [2, 1, 0, 1]),  # the last pass's own token is cut, its drafts are kept
        ([2, 1, 0, 1], 3, 7, [2, 1, 1, 0]),  # one draft is cut too
        ([2, 1, 0, 1], 3, 6, [2, 2, 0, 0]),
        ([2, 1, 0, 1], None, 6, [2, 2, 0, 0]),  # only one pass can have been the last
        ([0, 0, 0, 0], None, 1, [0, 0, 0, 0]),  # prefill alone
        ([2, 1, 0, 1], 0, 7, None),  # a pass without drafts has nothing to cut
        ([2, 1, 0, 1], None, 10, None),  # more tokens than passes can give
        ([2, 1, 0, 1], 3, 5, None),  # a last pass that kept nothing
    ],
)
def test_drafts_behind_the_answers_end_are_not_counted(histogram, last, tokens, kept):
    assert Passes(histogram, last).kept(tokens) == kept


def chunks(ids, metrics=None, finish="length"):
    """What vLLM streams for `ids`: the first token, the others, the usage."""
    for part, end in ((ids[:1], None), (ids[1:], finish)):
        yield {"choices": [{"token_ids": part, "text": "x" * len(part), "finish_reason": end}]}
    usage = {"prompt_tokens": 3, "completion_tokens": len(ids)}
    yield {"choices": [], "usage": usage} | (
        {"metrics": {"speculative_decoding": metrics}} if metrics else {}
    )


def ask(answer, counters=(), **options):
    """The Turn that a stand-in's chunks become. counters: /metrics before and after."""
    info, (turn,), bodies, _ = ask_in_turn([answer], counters, **options)
    return info, turn, bodies[0]


def ask_in_turn(answers, counters=(), **options):
    """Turns of answers to questions one after the other, and how many of `counters` were not read."""
    bodies, counters, answers = [], list(counters), list(answers)

    async def models(_):
        return web.json_response({"data": [{"id": "m", "root": "/models/m", "max_model_len": 64}]})

    async def completions(request):
        bodies.append(await request.json())
        chunks_ = answers[len(bodies) - 1]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks_) + "data: [DONE]\n\n"
        return web.Response(text=text, content_type="text/event-stream")

    async def metrics(_):
        return web.Response(text=counters.pop(0) if counters else "")

    async def version(_):
        return web.json_response({"version": "0.32.0"})

    async def run():
        app = web.Application()
        app.router.add_get("/v1/models", models)
        app.router.add_get("/version", version)
        app.router.add_get("/metrics", metrics)
        app.router.add_post("/v1/completions", completions)
        async with TestServer(app) as stand_in, VllmServer(str(stand_in.make_url("/")), **options) as server:
            sampling = {"temperature": 0.6, "seed": 7, "top_k": 20, "top_p": 0.95}
            return await server.info(), [await server.ask([1, 2, 3], 5, **sampling) for _ in answers]

    info, turns = asyncio.run(run())
    return info, turns, bodies, len(counters)


def exposition(drafts, *accepted):
    lines = [f'vllm:spec_decode_num_drafts_total{{engine="0"}} {drafts}.0']
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines += [f'{name}{{engine="0",position="{i}"}} {count}.0' for i, count in enumerate(accepted)]
    return "\n".join(["# HELP ...", *lines, "vllm:other 1.0"])


def test_an_answer_with_its_own_counts():
    metrics = {"acceptance_histogram": [1, 0, 1], "per_step_accepted": [0, 2]}
    info, turn, body = ask(chunks([5, 6, 7, 8], metrics), alone=False)
    assert info["model"] == "/models/m" and info["version"] == "0.32.0"
    assert turn.output_ids == [5, 6, 7, 8] and turn.finish == "length" and turn.prompt_tokens == 3
    assert (turn.verify_passes, turn.histogram) == (2, [1, 0, 1])  # the second pass's own token is cut
    assert turn.first_tokens == 1 and 0 < turn.first_s <= turn.latency_s
    assert body["prompt"] == [1, 2, 3] and body["return_token_ids"] and body["seed"] == 7
    # what the folder's generation_config.json would change
    assert (body["top_p"], body["top_k"], body["repetition_penalty"]) == (0.95, 20, 1.0)


def test_counters_tell_one_answers_passes_while_nobody_else_asks():
    counters = [exposition(10, 6, 2), exposition(12, 7, 3)]
    turn = ask(chunks([5, 6, 7, 8, 9]), counters)[1]
    assert (turn.verify_passes, turn.histogram) == (2, [1, 0, 1])
    with pytest.raises(BackendError, match="does somebody else ask"):
        ask(chunks([5, 6, 7, 8, 9]), [exposition(10, 6, 2), exposition(22, 7, 3)])


def test_a_reading_of_the_counters_ends_one_answer_and_begins_the_next():
    five = list(chunks([5, 6, 7, 8, 9]))
    counters = [exposition(10, 6, 2), exposition(12, 7, 3), exposition(16, 7, 3), "not read"]
    _, turns, _, left = ask_in_turn([five, five], counters)
    assert [turn.histogram for turn in turns] == [[1, 0, 1], [4, 0, 0]] and left == 1


def test_counters_are_not_read_from_servers_that_say_more_or_draft_nothing():
    own = list(chunks([5, 6, 7, 8], {"acceptance_histogram": [1, 0, 1], "per_step_accepted": [0, 2]}))
    _, turns, _, left = ask_in_turn([own] * 3, [exposition(10, 6, 2)] * 3)
    assert [turn.verify_passes for turn in turns] == [2, 2, 2] and left == 2  # none after the first answer
    plain = list(chunks([5, 6]))
    assert ask_in_turn([plain] * 3, ["", "", ""])[3] == 2


def test_a_server_that_does_not_draft():
    turn = ask(chunks([5, 6]))[1]
    assert turn.verify_passes is None and turn.histogram == []


@pytest.mark.parametrize(
    "answer, message",
    [
        ([{"error": {"message": "too long"}}], "too long"),
        ([{"choices": [{"text": "a", "finish_reason": "stop"}]}], "no token_ids"),
        (list(chunks([5, 6]))[:2], "the stream ended before the answer did"),
        ([], "the stream ended before the answer did"),
        (
            [*list(chunks([5, 6]))[:2], {"choices": [], "usage": {"completion_tokens": 3}}],
            "2 token ids for 3",
        ),
    ],
)
def test_nonsense_is_one_line(answer, message):
    with pytest.raises(BackendError, match=message) as caught:
        ask(answer, alone=False)
    assert "\n" not in str(caught.value)
