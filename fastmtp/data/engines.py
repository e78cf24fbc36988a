"""Starts SGLang servers set up for throughput: many requests at once, answers whole, several engines on one
GPU.

What bounds a small model is the engine's Python work per request and step, which one process does on one
core; a second engine on the same GPU takes half of it. Detokenising is left out: ids come back, and the
distiller decodes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from fastmtp.budget.shapes import cache_numbers
from fastmtp.cli import InputError
from fastmtp.engines.process import Server, free_ports, together
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang import command, sglang_version, without

GRAPHS = [
    1,
    2,
    4,
    8,
    16,
    32,
    64,
    96,
    128,
    192,
    256,
    320,
    384,
    448,
    512,
    640,
    768,
    896,
    1024,
    1280,
    1536,
    1792,
    2048,
]
# Unfinished answers are sent on every so many tokens, though nobody streams; never is best.
ENVIRONMENT = {"SGLANG_FORCE_STREAM_INTERVAL": "1000000"}


def throughput_flags(
    model: str, requests: int, dtype: str, engines_per_gpu: int, gpu_bytes: int
) -> list[str]:
    """SGLang flags for `requests` at a time in one engine, which has its share of a GPU of `gpu_bytes`."""
    graphs = [size for size in GRAPHS if size < requests] + [min(requests, GRAPHS[-1])]
    flags = [
        "--skip-tokenizer-init",
        "--disable-radix-cache",
        "--schedule-policy",
        "fcfs",
        "--skip-server-warmup",
    ]
    flags += [
        "--grammar-backend",
        "none",
        "--disable-prefill-cuda-graph",
        "--log-level",
        "warning",
        "--dtype",
        dtype,
    ]
    flags += ["--sampling-backend", "flashinfer"]  # PyTorch's sorts the whole vocabulary of every request
    flags += ["--max-running-requests", str(requests), "--cuda-graph-bs-decode", *map(str, graphs)]
    if engines_per_gpu > 1:
        # Engines that start together see each other's memory come and go; a fixed cache size is all they can
        # agree on.
        tokens = cache_tokens(
            model, requests, 4 if dtype == "float32" else 2, 0.8 * gpu_bytes / engines_per_gpu
        )
        flags += ["--mem-fraction-static", "0.9", "--max-total-tokens", str(tokens)]
    return flags


def cache_tokens(model: str, requests: int, width: int, share: float) -> int:
    """Tokens of key/value cache (`width` bytes per number) that fit beside the weights in `share` bytes of
    memory.

    Raises InputError where next to none do.
    """
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    a_token = config["num_hidden_layers"] * cache_numbers(config) * width
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    room = int((share - weights - 2e9) // a_token)  # 2e9: CUDA context, graphs, logits
    if room < 8192:
        raise InputError(f"--engines: {model} does not fit so often on one GPU; start fewer engines")
    return min(room, requests * config["max_position_embeddings"])


@contextlib.contextmanager
def engines(
    model: str, count: int, requests: int, dtype: str, flags: list[str], logs: Path
) -> Iterator[list[str]]:
    """Start `count` engines over the visible GPUs, together taking `requests` at a time; gives their URLs.

    `flags` override ours. Raises InputError without SGLang or a GPU, ServerError with the log's end when one
    fails.
    """
    sglang_version()
    gpus = torch.cuda.device_count()
    if not gpus:
        raise InputError(
            "--engines needs a GPU; leave it out to generate in this process, or give --server URL"
        )
    memory = torch.cuda.get_device_properties(0).total_memory
    ours = throughput_flags(model, -(-requests // count), dtype, -(-count // gpus), memory)
    servers = []
    for n, port in enumerate(free_ports(count)):
        own = [*without(ours, flags), "--base-gpu-id", str(n % gpus), *flags]
        line = command(Serving(model, num_steps=0, port=port, flags=own))
        servers.append(Server(line, port, logs / f"engine-{n}.log", env=ENVIRONMENT))
    with together(servers) as outcomes:
        for error in filter(None, outcomes):
            raise error
        yield [server.url for server in servers]
