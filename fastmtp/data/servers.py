"""Asks servers for answers over HTTP: SGLang's native /generate, which takes and gives token ids, or OpenAI's
chat.

A URL that ends in /v1 is taken for an OpenAI-compatible server. It gives token ids if it knows
`return_token_ids` (SGLang, vLLM); otherwise the answer's text is tokenised once, and the sample says so with
`"retokenised": true`. Without ids, an answer of which the server took a part out of the text (its thinking, a
tool call) is refused: what the model wrote can't be put together again.
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
from pathlib import Path

import aiohttp

from fastmtp.cli import InputError
from fastmtp.data.rendering import Refused, check_template
from fastmtp.data.sources import Sampling
from fastmtp.engines.client import session
from fastmtp.engines.process import ServerError
from fastmtp.inputs import read_json
from fastmtp.tokenizer import end_ids, load_tokenizer

ATTEMPTS = 6
BACKOFF = 0.5  # seconds before the second attempt; doubles, and jitter takes up to half away
LONGEST = 60.0
RETRIED = {408, 409, 425, 429}
HOPELESS = {401: "pass the right --api-key", 403: "pass the right --api-key", 404: "check the URL"}
# Requests leave together: one that arrives alone interrupts the engine's running batch for its own prefill.
PULSE = 0.25


class Again(Exception):
    """This attempt failed in a way that may pass. `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclass
class Answer:
    """`ids` end with an end token, or were cut at the limit. `prompt_ids`: as the server saw them, if it says
    so.
    """

    ids: list[int]
    prompt_ids: list[int] | None = None
    retokenised: bool = False


class Servers:
    """`async with Servers(urls, model, timeout) as servers:`; each request goes to the least busy one.

    Raises InputError on entry for a URL at which no such server answers.
    """

    def __init__(self, urls: list[str], model: str, timeout: float = 1800.0, api_key: str | None = None):
        self.urls = [url.rstrip("/") for url in urls]
        self.model_folder, self.tokenizer = model, load_tokenizer(model)
        self.eos_ids = end_ids(model, self.tokenizer)
        config = read_json(Path(model) / "config.json")
        self.context = config.get("max_position_embeddings")
        if type(self.context) is not int:
            raise InputError(
                f"{model}/config.json: no 'max_position_embeddings'; give a folder that "
                "fastmtp.prepare_model or fastmtp.export wrote"
            )
        self.size = max(len(self.tokenizer), config.get("vocab_size") or 0)
        self.timeout, self.api_key = timeout, api_key
        self.busy: Counter[str] = Counter()
        self.rest = dict.fromkeys(self.urls, 0.0)  # after a failure: until when others go first
        self.models: dict[str, str] = {}

    async def __aenter__(self) -> Servers:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a socket a request
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 16)), hard))
        self.session = session(self.timeout, self.api_key)
        try:
            check_template(self.tokenizer, self.model_folder)
            for url in self.urls:
                self.models[url] = await self._model(url)
        except BaseException:
            await self.session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def _model(self, url: str) -> str:
        """Name of the model that a server serves; InputError if none answers."""
        path = "/models" if url.endswith("/v1") else "/model_info"
        try:
            async with self.session.get(url + path, timeout=aiohttp.ClientTimeout(total=30)) as reply:
                status = reply.status
                body = await reply.json(content_type=None) if status == 200 else None
            return body["data"][0]["id"] if url.endswith("/v1") else body["model_path"]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InputError(f"--server {url}: {_text(error)}; start the server first") from None
        except (ValueError, TypeError, LookupError):
            if status in (401, 403):
                raise InputError(f"--server {url}: HTTP {status}; pass the right --api-key") from None
            raise InputError(
                f"--server {url}: {path} gives no model; give an SGLang server, "
                "or an OpenAI-compatible one as http://.../v1"
            ) from None

    async def ask(self, prompt_ids: list[int], messages: list[dict], sampling: Sampling) -> Answer:
        """One answer. Raises Refused if the server refuses, or after ATTEMPTS tries without an answer."""
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
                reason, wait = f"{url}: no answer within {self.timeout:g} s", 0.0
            except (aiohttp.ClientError, OSError) as error:
                reason, wait = f"{url}: {_text(error)}", 0.0
            finally:
                self.busy[url] -= 1
            backoff = min(BACKOFF * 2**attempt, LONGEST) * random.uniform(0.5, 1.0)
            self.rest[url] = time.monotonic() + backoff
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(max(backoff, wait))
        raise Refused(f"{reason} ({ATTEMPTS} attempts)", gone=True)

    async def _generate(self, url: str, prompt_ids: list[int], sampling: Sampling) -> Answer:
        parameters = _shared(sampling) | {"max_new_tokens": sampling.max_new_tokens}
        parameters["stop_token_ids"] = sorted(self.eos_ids)  # without a tokenizer a server may know only one
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
            message, kind = dict(choice["message"]), choice["finish_reason"]
        except (TypeError, ValueError, LookupError):
            raise Again(
                "the answer has no choices[0].message; is this an OpenAI-compatible server?"
            ) from None
        if ids := choice.get("token_ids"):
            return self._checked(ids, kind, choice.get("prompt_token_ids") or body.get("prompt_token_ids"))
        text = whole_text(message)
        answer = self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"], kind)
        answer.retokenised = True
        return answer

    def _checked(self, ids: object, kind: str, prompt_ids: object = None) -> Answer:
        """An answer that is whole: known ids, a known end. Raises Again for one that a retry may cure."""
        self._check_ids(ids, "tokens")
        if kind not in ("stop", "length"):
            raise Again(f"the answer ended with finish_reason {kind!r}")
        if kind == "stop" and not (ids and ids[-1] in self.eos_ids):  # some servers cut the end token off
            ids = [*ids, self.tokenizer.eos_token_id]
        if not ids:
            raise Again("the answer has no tokens")
        if prompt_ids is not None:
            self._check_ids(prompt_ids, "prompt tokens")
        return Answer(ids, prompt_ids)

    def _check_ids(self, ids: object, name: str) -> None:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise Again(f"the answer's {name} are no list of numbers")
        if ids and not 0 <= min(ids) <= max(ids) < self.size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise Refused(
                f"got the token id {wrong}, beyond the model's {self.size}; does the server serve --model?"
            )

    async def _post(self, url: str, body: dict) -> dict:
        async with self.session.post(url, json=body) as reply:
            data = await reply.read()
            if reply.status != 200:
                start = f"HTTP {reply.status}: {' '.join(data.decode('utf-8', 'replace').split())[:200]}"
                if reply.status in RETRIED or reply.status >= 500:
                    raise Again(start, retry_after(reply.headers.get("Retry-After")))
                if reply.status in HOPELESS:  # the same for every prompt
                    raise ServerError(f"{url}: {start}; {HOPELESS[reply.status]}")
                raise Refused(f"{url}: {start}")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise Again(f"the body is not JSON: {data[:80]!r}") from None


def whole_text(message: dict) -> str:
    """The text of an OpenAI answer, if it is all that the model wrote. Raises Refused otherwise."""
    for name in ("reasoning_content", "reasoning"):
        if message.get(name):
            raise Refused(
                f"got its thinking apart from the text (`{name}`) and no token ids; start the server without "
                "a reasoning parser, or one that knows return_token_ids"
            )
    for name in ("tool_calls", "function_call", "audio", "refusal"):
        if message.get(name):
            raise Refused(f"got `{name}` instead of the text that the model wrote, and no token ids")
    text = message.get("content")
    if not isinstance(text, str):
        kind = "no text" if text is None else f"a {type(text).__name__} instead of a text"
        raise Refused(f"got {kind} and no token ids")
    if not text:
        raise Refused("got an empty text and no token ids")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("got text that is not valid UTF-8") from None
    return text


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
