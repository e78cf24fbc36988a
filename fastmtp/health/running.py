"""What a running server says: does it serve this folder, and does it draft?"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fastmtp.engines.address import api_key
from fastmtp.fingerprint import content
from fastmtp.health.folder import ERROR, OK, WARNING, Folder, Line

NAMES = "drafts|accepted_tokens|accepted_tokens_per_pos"
COUNTER = re.compile(rf"vllm:spec_decode_num_({NAMES})_total\{{.*\}} (\S+)")


def server(folder: Folder, url: str) -> Iterator[Line]:
    """SGLang says all about itself, vLLM its model's path and its drafts, others their model's name."""
    url = url.rstrip("/").removesuffix("/v1")
    told = _json(url, "/server_info") or _json(url, "/get_server_info")
    if told:
        yield _serves(folder, told.get("model_path"))
        yield _sglang_drafts(told)
        return
    try:
        models = json.loads(_ask(url, "/v1/models"))["data"]
        name, path = models[0]["id"], models[0].get("root")
    except urllib.error.HTTPError as error:
        cure = "set OPENAI_API_KEY to its key" if error.code in (401, 403) else "check the URL"
        yield Line("server", ERROR, f"{url}/v1/models: HTTP {error.code}", cure)
        return
    except OSError:
        yield Line("server", ERROR, f"{url} does not answer", "start it, or check host and port")
        return
    except (ValueError, LookupError, TypeError, AttributeError):
        yield Line("server", ERROR, f"{url}/v1/models names no model", "give an SGLang or vLLM server")
        return
    if not _json(url, "/version"):
        yield Line("server", WARNING, f"serves {name}; it does not say whether it drafts", "look at /metrics")
        return
    yield _serves(folder, path)
    yield _vllm_drafts(url)


def _serves(folder: Folder, path: str | None) -> Line:
    """Whether a server whose model is `path` serves `folder`."""
    if path and (Path(path) / "config.json").is_file() and content(path) == content(folder.path):
        return Line("server", OK, "serves this folder")
    if path and Path(path).exists():
        return Line("server", ERROR, f"serves another model: {path}", "start it on this folder")
    return Line("server", WARNING, f"serves {path}, which cannot be compared from this machine")


def _sglang_drafts(told: dict) -> Line:
    if not told.get("speculative_algorithm"):
        return Line("drafts", ERROR, "the server does not draft", "start it with fastmtp.serve")
    map_ = told.get("speculative_token_map")
    text = f"{told['speculative_algorithm']}, K={told.get('speculative_num_steps')}"
    return Line("drafts", OK, f"{text}, token map {map_ or 'none'}")


def _vllm_drafts(url: str) -> Line:
    """From vLLM's counters, which are there from the start if it drafts. They do not tell a token map."""
    try:
        text = _ask(url, "/metrics")
    except OSError:
        return Line("drafts", WARNING, "the server shows no /metrics, so it does not say whether it drafts")
    counts, positions = {}, 0
    for line in text.splitlines():
        if found := COUNTER.match(line):
            counts[found[1]] = counts.get(found[1], 0.0) + float(found[2])
            positions += found[1].endswith("per_pos")
    if "drafts" not in counts:
        return Line("drafts", ERROR, "the server does not draft", "start it with fastmtp.serve")
    tau = f"{1 + counts['accepted_tokens'] / counts['drafts']:.2f}" if counts["drafts"] else "unknown"
    return Line("drafts", OK, f"MTP, K={positions}, accept length {tau} since its start")


def _ask(url: str, path: str) -> str:
    """What our own server answers, never through a proxy. Raises OSError, HTTPError among them."""
    key = api_key(None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url + path, headers=headers), timeout=10) as answer:
        return answer.read().decode("utf-8", "replace")


def _json(url: str, path: str) -> dict | None:
    """A JSON object; None if there is none."""
    try:
        value = json.loads(_ask(url, path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
