"""A vLLM server as a backend: token ids in, token ids out, with the engine's own count of verify passes.

vLLM 0.32 gives each answer's accepted drafts, pass by pass, if it was started with `flags`. Older servers
give counters for all answers together, which tell one answer's passes only while nobody else asks.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass

from evaluation.backends import NEVER, BackendError, Server, Turn
from fastmtp.engines.vllm import PER_REQUEST, Engine

UNCACHED = ["--no-enable-prefix-caching"]  # no arm profits from another's prompts
COUNTED = ["--per-request-spec-decode-metrics", "detailed"]
DRAFTS = "vllm:spec_decode_num_drafts_total"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
POSITION = re.compile(r'position="(\d+)"')


@dataclass
class Passes:
    """An answer's verify passes. histogram[j]: those with j accepted drafts; last: the last pass's j."""

    histogram: list[int]
    last: int | None = None

    def kept(self, tokens: int) -> list[int] | None:
        """The histogram of an answer of `tokens` tokens; None if it cannot be that answer's.

        vLLM also counts drafts accepted behind the answer's end, and it accepts those in the last pass alone.
        """
        result = list(self.histogram)
        surplus = 1 + sum((j + 1) * count for j, count in enumerate(result)) - tokens
        if surplus <= 1:  # one too many is the last pass's own token, which is no draft
            return result if surplus >= 0 else None
        # The last pass kept a token, so it accepted at least as many drafts as were cut. Counters do not say
        # which pass was last.
        possible = [j for j in range(surplus, len(result)) if result[j]]
        last = self.last if self.last is not None else next(iter(possible), None)
        if last not in possible:
            return None
        result[last] -= 1
        result[last + 1 - surplus] += 1
        return result


def flags(engine: Engine, num_steps: int) -> list[str]:
    """For a server that is measured: vLLM refuses to count drafts if there are none."""
    return [*UNCACHED, *(COUNTED if num_steps and engine.release >= PER_REQUEST else [])]


class VllmServer(Server):
    """`async with VllmServer(url) as server:`. alone: one request at a time, so counters may be read."""

    def __init__(self, url: str, timeout: float = 600.0, key: str | None = None, alone: bool = True):
        super().__init__(url, timeout, key)
        self.alone = alone
        self.reading: list[int] | None = None  # counters after the last answer
        self.counting = alone  # until the server says passes with its answers, or does not draft

    async def info(self) -> dict:
        """`{"model", "tokenizer", "version", "settings"}` as the server says."""
        models = (await self._json("/v1/models")).get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict):
            raise BackendError(f"{self.url}/v1/models: no model in it; is this a vLLM server?")
        self.model = models[0].get("id")
        root = models[0].get("root") or self.model
        version = (await self._json("/version")).get("version")
        settings = {"max_model_len": models[0].get("max_model_len")}
        return {"model": root, "tokenizer": root, "version": version, "settings": settings}

    async def flush(self) -> None:
        """Nothing: our servers keep no prompts (UNCACHED)."""

    async def ask(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_k: int = 0,
        top_p: float = 1.0,
        ignore_eos: bool = False,
    ) -> Turn:
        """One request. BackendError if the server fails, hangs past the time limit or answers nonsense."""
        if not hasattr(self, "model"):
            await self.info()
        body = {
            "model": self.model,
            "prompt": prompt_ids,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "ignore_eos": ignore_eos,
            # the folder's generation_config.json would set these otherwise
            "top_p": top_p,
            "top_k": top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "stream_interval": NEVER,
            "return_token_ids": True,
        }
        before, self.reading = self.reading, None
        if self.counting and before is None:
            before = await self._counters()
        answer = Answer(self.url)
        started, clock = time.time(), time.perf_counter()
        async with self._post("/v1/completions", body) as reply:
            async for line in reply.content:
                if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                    answer.take(line[5:].strip(), time.perf_counter() - clock)
        passes = answer.passes()
        if passes or before is None:
            self.counting = False
        elif self.counting:
            # Nobody else asks, so this reading is also the next answer's first.
            self.reading = await self._counters()
            passes = Passes([late - early for late, early in zip(self.reading, before, strict=True)])
        return answer.turn(passes, started)

    async def _counters(self) -> list[int] | None:
        """All answers' histogram of accepted drafts; None if the server does not draft."""
        async with self._asking("/metrics"):
            async with self.session.get(self.url + "/metrics") as reply:
                if reply.status != 200:
                    raise BackendError(f"{self.url}/metrics: HTTP {reply.status}; is this a vLLM server?")
                text = await reply.text()
        drafts, accepted = None, {}
        for line in text.splitlines():
            name, value = line.partition("{")[0], line.rsplit(" ", 1)[-1]
            if name == DRAFTS:
                drafts = int(float(value))
            elif name == PER_POSITION and (position := POSITION.search(line)):
                accepted[int(position[1])] = int(float(value))
        if drafts is None:
            return None
        # passes with at least j accepted drafts, j = 0, 1, ..., and none with more than all
        reached = [drafts, *(accepted[position] for position in sorted(accepted)), 0]
        return [here - further for here, further in zip(reached, reached[1:], strict=False)]


class Answer:
    """A streamed completion, put together."""

    def __init__(self, url: str):
        self.url, self.ids, self.text, self.finish, self.usage, self.drafting = url, [], "", None, None, None
        self.first_tokens, self.first_s, self.latency_s = 0, None, 0.0

    def take(self, data: bytes, seconds: float) -> None:
        """One chunk, `seconds` after the request."""
        where = f"{self.url}/v1/completions"
        try:
            chunk = json.loads(data)
        except json.JSONDecodeError:
            raise BackendError(f"{where}: a streamed line is not JSON: {data[:80]!r}") from None
        if not isinstance(chunk, dict) or "error" in chunk:
            error = chunk.get("error") if isinstance(chunk, dict) else chunk
            raise BackendError(f"{where}: {error.get('message') if isinstance(error, dict) else error}")
        for choice in chunk.get("choices") or []:
            ids = choice.get("token_ids")
            if not isinstance(ids, list):
                raise BackendError(f"{where}: no token_ids in the answer; is this vLLM 0.25 or later?")
            if ids and self.first_s is None:
                self.first_s, self.first_tokens = seconds, len(ids)
            self.ids += ids
            self.text += choice.get("text") or ""
            self.finish = choice.get("finish_reason") or self.finish
            self.latency_s = seconds
        self.usage = chunk.get("usage") or self.usage
        self.drafting = (chunk.get("metrics") or {}).get("speculative_decoding") or self.drafting

    def passes(self) -> Passes | None:
        """The verify passes, if the server says them with the answer."""
        if not self.drafting or not isinstance(self.drafting.get("acceptance_histogram"), list):
            return None
        steps = self.drafting.get("per_step_accepted")
        return Passes(self.drafting["acceptance_histogram"], steps[-1] if steps else None)

    def turn(self, passes: Passes | None, started: float) -> Turn:
        where = f"{self.url}/v1/completions"
        if self.finish is None or self.usage is None or self.first_s is None:
            raise BackendError(f"{where}: the stream ended before the answer did; see the server's log")
        if self.usage.get("completion_tokens") != len(self.ids):
            raise BackendError(
                f"{where}: {len(self.ids)} token ids for {self.usage.get('completion_tokens')} tokens"
            )
        kept = passes.kept(len(self.ids)) if passes else []
        if kept is None:
            raise BackendError(
                f"{where}: accept counts {passes.histogram} do not fit {len(self.ids)} tokens; "
                "does somebody else ask this server too?"
            )
        return Turn(
            output_ids=self.ids,
            text=self.text,
            prompt_tokens=self.usage.get("prompt_tokens", 0),
            verify_passes=sum(kept) if passes else None,
            histogram=kept,
            first_tokens=self.first_tokens,
            first_s=self.first_s,
            latency_s=self.latency_s,
            started=started,
            finish=self.finish,
        )
