"""Who answers: an SGLang server over its native /generate, or the reference decoder in this process.

Token ids go in, token ids come out, with the engine's own accounting. Responses are streamed with an interval
longer
than any answer, so a request costs the server two messages: its first token, which gives the time to first
token, and its end, whose `meta_info` holds verify passes and the accept histogram. SGLang 0.5.17 to 0.5.23
take `stream_interval` per request.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass

import aiohttp

from fastmtp.engines import client
from fastmtp.reference import model, speculative
from fastmtp.trees.tree import DraftTree
from fastmtp.vocab.draft_vocab import load_map


class BackendError(Exception):
    """The server or decoder failed or answered nonsense. One line; answers already finished are kept."""


class Rejected(BackendError):
    """This one question was refused; others may be answered."""


REJECTIONS = (400, 413, 422)  # HTTP statuses that say something of one request, not of the server


@dataclass
class Turn:
    """One request's answer. Seconds are the client's clock.

    output_ids: end token included. text: None from a server without a tokenizer. verify_passes, histogram:
    None and [] without speculation; `histogram[j]` counts the verify passes with exactly j accepted drafts.
    first_tokens: tokens that came with the first chunk, first_s: when it came; so (tokens - first_tokens) /
    (latency_s - first_s) is decoding alone.
    """

    output_ids: list[int]
    text: str | None
    prompt_tokens: int
    verify_passes: int | None
    histogram: list[int]
    first_tokens: int
    first_s: float
    latency_s: float
    started: float
    finish: str


NEVER = 1 << 20  # tokens between two streamed chunks
SHOWN = (
    "dtype",
    "attention_backend",
    "sampling_backend",
    "tp_size",
    "max_running_requests",
    "mem_fraction_static",
    "cuda_graph_max_bs_decode",
    "disable_overlap_schedule",
    "enable_deterministic_inference",
    "speculative_algorithm",
    "speculative_num_steps",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
    "speculative_token_map",
    "speculative_draft_attention_backend",
)
# What a server says of itself that is not how it computes: names, places, keys, and what changes by itself.
NOT_SETTINGS = re.compile(
    r"host|port|.*_port|.*_path|.*_dir|.*_key|.*_file|.*_name|.*_url|.*addr|base_gpu_id|version|status|.*pid"
    r"|log_.*|.*_log.*|.*metrics.*|.*trace.*|crash.*|random_seed|max_total_num_tokens|max_req_input_len|uptime.*"
    r"|watchdog_.*|show_.*|.*warmups?|speculative_token_map|.*gpu_mem.*|.*_time|.*throughput"
)


class Server:
    """`async with Server("http://127.0.0.1:30000") as server:`; every failure is one BackendError."""

    def __init__(self, url: str, timeout: float = 600.0, key: str | None = None):
        self.url, self.timeout, self.key = url.rstrip("/"), timeout, key

    async def __aenter__(self) -> Server:
        # One line of a stream holds a whole answer, so the line buffer must be larger than aiohttp's 64 kB.
        self.session = client.session(self.timeout, self.key, line=1 << 24)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def info(self) -> dict:
        """`{"model", "tokenizer", "version", "token_map", "settings", "all_settings"}` as the server says.
        `settings` are those worth showing.
        """
        model = await self._json("/model_info")
        server = await self._json("/server_info")
        simple = {k: v for k, v in server.items() if isinstance(v, (bool, int, float, str))}
        if not isinstance(model.get("model_path"), str):
            raise BackendError(f"{self.url}/model_info: no model_path; is this an SGLang server?")
        return {
            "model": model["model_path"],
            "tokenizer": model.get("tokenizer_path") or model["model_path"],
            "version": server.get("version"),
            "token_map": server.get("speculative_token_map"),
            "settings": {name: server[name] for name in SHOWN if name in server},
            "all_settings": {k: v for k, v in simple.items() if v and not NOT_SETTINGS.fullmatch(k)},
        }

    async def flush(self) -> None:
        """Empty the prefix cache, so that no arm profits from another's prompts."""
        async with self._post("/flush_cache?timeout=30"):
            pass

    async def ask(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_k: int = 0,
        top_p: float = 1.0,
        ignore_eos: bool = False,
        custom_params: dict | None = None,
    ) -> Turn:
        """One request; the engine gets `custom_params` as they are.

        Raises BackendError when the server fails, hangs past the time limit or answers nonsense.
        """
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "stream_interval": NEVER,
            "ignore_eos": ignore_eos,
        }
        if temperature > 0:
            sampling |= {"sampling_seed": seed, "top_k": top_k or -1, "top_p": top_p}
        if custom_params:
            sampling["custom_params"] = custom_params
        body = {"input_ids": prompt_ids, "sampling_params": sampling, "stream": True}
        started, clock = time.time(), time.perf_counter()
        first_s, first_tokens, last = None, 0, None
        async with self._post("/generate", body) as reply:
            async for line in reply.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    break
                last = _chunk(data, self.url)
                if first_s is None:
                    first_s = time.perf_counter() - clock
                    first_tokens = last["meta_info"]["completion_tokens"]
                latency_s = time.perf_counter() - clock
        if last is None:
            raise BackendError(f"{self.url}/generate: the answer had no content; see the server's log")
        return _turn(last, self.url, first_tokens, first_s, latency_s, started)

    async def post(self, path: str, body: dict) -> None:
        async with self._post(path, body):
            pass

    @contextlib.asynccontextmanager
    async def _post(self, path: str, body: dict | None = None):
        """The reply to a POST; BackendError unless its status is 200."""
        async with self._asking(path), await client.post(self.session, self.url + path, body) as reply:
            if reply.status != 200:
                kind = Rejected if body and reply.status in REJECTIONS else BackendError
                raise kind(f"{self.url}{path}: HTTP {reply.status}: {await _start(reply)}")
            yield reply

    async def _json(self, path: str) -> dict:
        async with self._asking(path):
            async with self.session.get(self.url + path) as reply:
                if reply.status != 200:
                    raise BackendError(f"{self.url}{path}: HTTP {reply.status}: {await _start(reply)}")
                body = await reply.json(content_type=None)
        if not isinstance(body, dict):
            raise BackendError(f"{self.url}{path}: expected a JSON object; is this an SGLang server?")
        return body

    @contextlib.asynccontextmanager
    async def _asking(self, path: str):
        """Turn what aiohttp raises into one line."""
        try:
            yield
        except TimeoutError:
            raise BackendError(
                f"{self.url}{path}: no answer within {self.timeout:g} s; see the server's log"
            ) from None
        except json.JSONDecodeError:
            raise BackendError(f"{self.url}{path}: the body is not JSON; is this an SGLang server?") from None
        except (aiohttp.ClientError, OSError) as error:
            text = str(error) or type(error).__name__
            raise BackendError(f"{self.url}{path}: {text}; the server is gone or was never there") from None


async def _start(reply: aiohttp.ClientResponse) -> str:
    """The beginning of an error's body, on one line."""
    return " ".join((await reply.text(errors="replace")).split())[:200]


def _chunk(data: bytes, url: str) -> dict:
    """One streamed chunk with the fields we rely on."""
    try:
        chunk = json.loads(data)
    except json.JSONDecodeError:
        raise BackendError(f"{url}/generate: a streamed line is not JSON: {data[:80]!r}") from None
    if isinstance(chunk, dict) and "error" in chunk:
        error = chunk["error"]
        raise BackendError(
            f"{url}/generate: {error.get('message', error) if isinstance(error, dict) else error}"
        )
    meta = chunk.get("meta_info") if isinstance(chunk, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get("completion_tokens"), int):
        raise BackendError(
            f"{url}/generate: no meta_info.completion_tokens in the answer; is this an SGLang server?"
        )
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        raise BackendError(f"{url}/generate: aborted: {finish.get('message', 'no reason given')}")
    return chunk


def _turn(last: dict, url: str, first_tokens: int, first_s: float, latency_s: float, started: float) -> Turn:
    meta, ids = last["meta_info"], last.get("output_ids")
    finish = meta.get("finish_reason")
    if not isinstance(finish, dict):
        raise BackendError(f"{url}/generate: the stream ended before the answer did; see the server's log")
    if not isinstance(ids, list) or len(ids) != meta["completion_tokens"]:
        count = len(ids) if isinstance(ids, list) else "no"
        raise BackendError(
            f"{url}/generate: {count} output_ids for {meta['completion_tokens']} tokens; "
            "start the server without --incremental-streaming-output"
        )
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BackendError(f"{url}/generate: output_ids that are no token ids; is this an SGLang server?")
    text = last.get("text")
    passes = meta.get("spec_verify_ct")
    return Turn(
        output_ids=ids,
        text=text.encode("utf-8", "replace").decode()
        if isinstance(text, str)
        else None,  # no half characters
        prompt_tokens=meta.get("prompt_tokens", 0),
        verify_passes=passes if type(passes) is int else None,
        histogram=_histogram(meta),
        first_tokens=first_tokens,
        first_s=first_s,
        latency_s=latency_s,
        started=started,
        finish=str(finish.get("type")),
    )


def _histogram(meta: dict) -> list[int]:
    """Verify passes by number of accepted drafts, under its present or its older name; [] if it is absent."""
    for name in ("spec_correct_drafts_histogram", "spec_accept_histogram"):
        counts = meta.get(name)
        if isinstance(counts, list) and counts and all(type(n) is int and n >= 0 for n in counts):
            return counts
    return []


class Reference:
    """Answers like `Server`, one request at a time. drafts: a chain's length or a tree; 0: plain decoding."""

    def __init__(
        self, model_folder: str, dtype: str, device: str, drafts: int | DraftTree, token_map: str | None
    ):
        self.model_folder, self.dtype, self.device = model_folder, dtype, device
        self.drafts, self.token_map = drafts, token_map

    async def __aenter__(self) -> Reference:
        self.model = model.load(self.model_folder, dtype=self.dtype, device=self.device)
        size, tokenizer = self.model.net.vocab_size, self.model.tokenizer
        self.map = load_map(self.token_map, tokenizer, size) if self.token_map else None
        return self

    async def __aexit__(self, *_: object) -> None:
        del self.model

    async def info(self) -> dict:
        settings = {"dtype": self.dtype, "device": self.device}
        return {
            "model": self.model_folder,
            "tokenizer": self.model_folder,
            "version": None,
            "token_map": self.token_map,
            "settings": settings,
        }

    async def flush(self) -> None:
        """Nothing is cached between requests."""

    async def ask(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Turn:
        """One answer; it samples from all tokens, so top_k and top_p must say so."""
        assert top_k == 0 and top_p == 1.0
        started, clock = time.time(), time.perf_counter()
        result = speculative.generate(
            self.model,
            prompt_ids,
            max_new_tokens,
            drafts=self.drafts,
            temperature=temperature,
            seed=seed,
            token_map=self.map,
        )
        latency_s = time.perf_counter() - clock
        return Turn(
            output_ids=list(result.ids),
            text=self.model.tokenizer.decode(result.ids, skip_special_tokens=True),
            prompt_tokens=len(prompt_ids),
            verify_passes=result.verify_passes if self.drafts else None,
            histogram=list(result.histogram) if self.drafts else [],
            first_tokens=1,
            first_s=result.prefill_s,
            latency_s=latency_s,
            started=started,
            finish="stop" if result.ids and result.ids[-1] in self.model.eos_ids else "length",
        )
