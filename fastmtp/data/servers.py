"""Asks servers for answers over HTTP: SGLang's native /generate, which takes and gives token ids, or OpenAI's
chat.

A URL that ends in /v1 is taken for an OpenAI-compatible server. It gives token ids where it knows
`return_token_ids` (SGLang, vLLM); elsewhere the answer's text is tokenised once, and the sample says so with
`"retokenised": true`.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import resource
import time
from collections import Counter
from dataclasses import dataclass

import aiohttp

from fastmtp.cli import InputError
from fastmtp.data.mixture import Sampling
from fastmtp.engines import client

ATTEMPTS = 6
BACKOFF = 0.5  # seconds before the second attempt; doubles, and jitter takes up to half away
LONGEST = 60.0
RETRIED = {408, 409, 425, 429}
# Requests leave together: one that arrives alone interrupts the engine's running batch for a prefill of its
# own.
PULSE = 0.25


class Refused(Exception):
    """No answer to this prompt, after all attempts or at once. The message is the reason."""


class Again(Exception):
    """This attempt failed in a way that may pass. `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclass
class Answer:
    """`ids` end with an end token, or were cut at the limit. `prompt_ids`: as the server saw them, where it
    says so.
    """

    ids: list[int]
    prompt_ids: list[int] | None = None
    retokenised: bool = False


class Servers:
    """`async with Servers(urls, tokenizer, eos_ids, timeout) as servers:`; each request goes to the least
    busy one.

    Raises InputError on entry for a URL where no such server answers.
    """

    def __init__(self, urls: list[str], tokenizer, eos_ids: set[int], timeout: float = 1800.0):
        self.urls = [url.rstrip("/") for url in urls]
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.timeout = aiohttp.ClientTimeout(total=timeout)
        self.busy: Counter[str] = Counter()
        self.rest: dict[str, float] = dict.fromkeys(
            self.urls, 0.0
        )  # after a failure, until when others go first
        self.models: dict[str, str] = {}

    async def __aenter__(self) -> Servers:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a socket a request
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 16)), hard))
        self.session = client.session(self.timeout.total)
        try:
            for url in self.urls:
                self.models[url] = await self._model(url)
        except BaseException:
            await self.session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def _model(self, url: str) -> str:
        path = "/models" if url.endswith("/v1") else "/model_info"
        try:
            async with self.session.get(url + path, timeout=aiohttp.ClientTimeout(total=30)) as reply:
                body = await reply.json(content_type=None) if reply.status == 200 else None
            return body["data"][0]["id"] if url.endswith("/v1") else body["model_path"]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InputError(f"--server {url}: {_text(error)}; start the server first") from None
        except (ValueError, TypeError, LookupError):
            raise InputError(
                f"--server {url}: {path} gives no model; give an SGLang server, or an OpenAI-compatible one as http://.../v1"
            ) from None

    async def ask(self, prompt_ids: list[int], messages: list[dict], sampling: Sampling) -> Answer:
        """One answer. Raises Refused when there is none after ATTEMPTS tries, or the server will not have the
        request.
        """
        await asyncio.sleep(PULSE - time.monotonic() % PULSE if PULSE else 0)
        url = None
        for attempt in range(ATTEMPTS):
            failed, now = url, time.monotonic()
            url = min(self.urls, key=lambda u: (u == failed, self.rest[u] > now, self.busy[u]))  # noqa: B023
            self.busy[url] += 1
            try:
                if url.endswith("/v1"):
                    return await self._chat(url, messages, sampling)
                return await self._generate(url, prompt_ids, sampling)
            except Again as failure:
                reason, wait = f"{url}: {failure}", failure.wait
            except TimeoutError:
                reason, wait = f"{url}: no answer within {self.timeout.total:g} s", 0.0
            except (aiohttp.ClientError, OSError) as error:
                reason, wait = f"{url}: {_text(error)}", 0.0
            finally:
                self.busy[url] -= 1
            backoff = min(BACKOFF * 2**attempt, LONGEST) * random.uniform(0.5, 1.0)
            self.rest[url] = time.monotonic() + backoff
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(max(backoff, wait))
        raise Refused(f"{reason} ({ATTEMPTS} attempts)")

    async def _generate(self, url: str, prompt_ids: list[int], sampling: Sampling) -> Answer:
        parameters = _shared(sampling) | {"max_new_tokens": sampling.max_new_tokens}
        parameters["stop_token_ids"] = sorted(
            self.eos_ids
        )  # a server without a tokenizer may know one of them alone
        body = await self._post(url + "/generate", {"input_ids": prompt_ids, "sampling_params": parameters})
        try:
            ids, reason = body["output_ids"], body["meta_info"]["finish_reason"]
            kind = reason["type"]
        except (TypeError, LookupError):
            raise Again("the answer has no output_ids or finish_reason; is this an SGLang server?") from None
        if kind == "abort":
            raise Again(f"aborted: {reason.get('message', 'no reason given')}")
        return self._checked(ids, kind)

    async def _chat(self, url: str, messages: list[dict], sampling: Sampling) -> Answer:
        asked = [{"role": m["role"], "content": m["content"]} for m in messages]
        parameters = _shared(sampling) | {"max_tokens": sampling.max_new_tokens, "return_token_ids": True}
        body = await self._post(
            url + "/chat/completions", {"model": self.models[url], "messages": asked, **parameters}
        )
        try:
            choice = body["choices"][0]
            text, kind = choice["message"]["content"] or "", choice["finish_reason"]
        except (TypeError, LookupError):
            raise Again(
                "the answer has no choices[0].message; is this an OpenAI-compatible server?"
            ) from None
        ids = choice.get("token_ids")
        if ids:
            return self._checked(ids, kind, choice.get("prompt_token_ids") or body.get("prompt_token_ids"))
        answer = self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"], kind)
        answer.retokenised = True
        return answer

    def _checked(self, ids: object, kind: str, prompt_ids: list[int] | None = None) -> Answer:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise Again("the answer's tokens are no list of numbers")
        if kind not in ("stop", "length"):
            raise Again(f"the answer ended with finish_reason {kind!r}")
        if kind == "stop" and not (ids and ids[-1] in self.eos_ids):  # some servers cut the end token off
            ids = [*ids, self.tokenizer.eos_token_id]
        if not ids:
            raise Again("the answer has no tokens")
        return Answer(ids, prompt_ids)

    async def _post(self, url: str, body: dict) -> dict:
        async with self.session.post(url, json=body) as reply:
            data = await reply.read()
            if reply.status != 200:
                start = f"HTTP {reply.status}: {' '.join(data.decode('utf-8', 'replace').split())[:200]}"
                if reply.status in RETRIED or reply.status >= 500:
                    raise Again(start, retry_after(reply.headers.get("Retry-After")))
                raise Refused(f"{url}: {start}")
        try:
            return json.loads(data)
        except ValueError:
            raise Again(f"the body is not JSON: {data[:80]!r}") from None


def _shared(sampling: Sampling) -> dict:
    if sampling.temperature == 0:
        return {"temperature": 0.0}
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds a number or a date; 0 without one or with nonsense."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
