"""Engines that take a folder, the accept length to expect, and what a running server says."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fastmtp.checkpoint import CODE, CONTRACT_KEY, is_post_norm
from fastmtp.data.samples import read_samples
from fastmtp.engines.sglang import check_model
from fastmtp.fingerprint import content
from fastmtp.health.folder import ERROR, OK, WARNING, Folder, Line
from fastmtp.model import load
from fastmtp.teacher_forced import measure, pooled
from fastmtp.tokenizer import load_tokenizer

USELESS = 1.1  # accept length below which a head costs more than it brings


def engines(folder: Folder) -> Iterator[Line]:
    check_model(str(folder.path), 3)
    heads, groups = (folder.config.get(f"num_{kind}_heads", 1) for kind in ("attention", "key_value"))
    sizes = [n for n in (1, 2, 4, 8) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
    contract = folder.config.get(CONTRACT_KEY)
    pre_norm = isinstance(contract, dict) and contract.get("mtp_hidden") == "pre_norm"
    if pre_norm:
        text = "hands over the state after the final norm; this head was trained on the one before it"
        yield Line(
            "SGLang", ERROR, text, "serve it with --engine vllm, or train it with mtp_hidden post_norm"
        )
    else:
        yield Line("SGLang", OK, f"takes it; tensor parallel sizes {', '.join(map(str, sizes))}")
    if pre_norm or is_post_norm(folder.config):
        yield Line("vLLM", OK, "takes it with FastMTP's plugin (pip install -e . beside vLLM)")
    else:
        text = "its MiMo hands the head the state before the final norm; fewer drafts may be accepted"
        yield Line("vLLM", WARNING, text, "export the head with fastmtp.export if FastMTP trained it")
    absent = [path.name for path in CODE if not (folder.path / path.name).is_file()]
    text = f"lacks {absent[0]}: the head is left out" if absent else "takes it; the head with remote code"
    yield Line("transformers", WARNING if absent else OK, text, "prepare the folder again" if absent else "")


def expected(folder: Folder, data: str, limit: int, num_steps: int) -> Iterator[Line]:
    own = load_tokenizer(folder.path)
    samples = read_samples(data, folder.config["vocab_size"], limit, own)
    result = pooled(measure(load(folder.path), samples, num_steps))
    tau = result.accept_length
    text = f"{'unknown' if tau is None else f'{tau:.2f}'} with {num_steps} drafts, on {len(samples)} samples"
    if tau is None or tau < USELESS:
        cure = "the head is not trained, or the backbone was changed after it was: train it again"
        yield Line("accept length", ERROR, text, cure)
    else:
        yield Line("accept length", OK, text)


def server(folder: Folder, url: str) -> Iterator[Line]:
    """What an SGLang server says about itself. Other servers name their model and nothing more."""
    told = _ask(url, "/server_info") or _ask(url, "/get_server_info")
    if not told:
        models = _ask(url, "/v1/models")
        if models is None:
            yield Line("server", ERROR, f"{url} does not answer", "start it, or check host and port")
            return
        name = (models.get("data") or [{}])[0].get("id")
        yield Line("server", WARNING, f"serves {name}; it does not say whether it drafts", "look at /metrics")
        return
    path = told.get("model_path")
    if path and (Path(path) / "config.json").is_file() and content(path) == content(folder.path):
        yield Line("server", OK, "serves this folder")
    elif path and Path(path).exists():
        yield Line("server", ERROR, f"serves another model: {path}", "start it on this folder")
    else:
        yield Line("server", WARNING, f"serves {path}, which cannot be compared from this machine")
    if not told.get("speculative_algorithm"):
        yield Line("drafts", ERROR, "the server does not draft", "start it with fastmtp.serve")
        return
    map_ = told.get("speculative_token_map")
    text = f"{told['speculative_algorithm']}, K={told.get('speculative_num_steps')}"
    yield Line("drafts", OK, f"{text}, token map {map_ or 'none'}")


def _ask(url: str, path: str) -> dict | None:
    """A JSON object of our own server, never through a proxy; None if there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url.rstrip("/") + path, timeout=10) as answer:
            value = json.load(answer)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
