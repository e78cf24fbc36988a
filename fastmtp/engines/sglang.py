"""SGLang: its command line for our folders, and what of it must be checked before minutes are spent.

Built for 0.5.17 or later.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from fastmtp.cli import InputError, split_at_dashes
from fastmtp.engines.process import HOST
from fastmtp.files import existing, python_path
from fastmtp.tokenizer import load_tokenizer
from fastmtp.vocab import draft_vocab

OLDEST = (0, 5, 17)
EXTERNAL_PACKAGE = "SGLANG_EXTERNAL_MODEL_PACKAGE"  # SGLang takes models of this package before its own
VOCAB_READY = "draft vocabulary: ready"  # what fastmtp.sglang_ext logs once it is in use


def sglang_version() -> str:
    """Version of the installed SGLang. Raises InputError where there is none, or one too old."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            "SGLang is not installed; pip install -e '.[serve]' on a machine with a GPU"
        ) from None
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise InputError(f"SGLang {version} is too old; pip install 'sglang>={'.'.join(map(str, OLDEST))}'")
    return version


def attention_backend() -> str:
    """fa3 where its kernels are installed and the GPU is Hopper, which alone runs them; else triton.

    SGLang's own default on Hopper is fa3 whether or not its kernels are there, and then fails at start.
    """
    spec = importlib.util.find_spec("sgl_kernel")
    folders = list(spec.submodule_search_locations or []) if spec else []
    kernels = [file for folder in folders for file in Path(folder).glob("**/flash_ops*.so")]
    return "fa3" if kernels and compute_capability().startswith("9.") else "triton"


def compute_capability() -> str:
    """Of the first GPU, as `9.0`; empty without one. Asked without making a context on it."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.split("\n")[0].strip()


def check_model(folder: str, num_steps: int) -> dict:
    """The folder's config. Raises InputError for what SGLang would only reveal minutes later, or never."""
    path = existing(existing(folder, "model folder") / "config.json", "model config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); export the model again") from None
    if num_steps and "MiMoForCausalLM" not in config.get("architectures", []):
        raise InputError(
            f"{path}: architectures is {config.get('architectures')}; export with fastmtp.export, or --no-spec"
        )
    if num_steps and config.get("num_nextn_predict_layers") != 1:
        # SGLang would allocate the draft's KV cache for every layer of the backbone.
        found = config.get("num_nextn_predict_layers")
        raise InputError(f"{path}: num_nextn_predict_layers is {found}, must be 1; export the model again")
    return config


def command(
    model: str,
    num_steps: int = 3,
    token_map: str | None = None,
    tp: int = 1,
    port: int = 30000,
    flags: list[str] = (),
    backend: str | None = None,
) -> list[str]:
    """SGLang's command line. num_steps 0 is plain decoding; `flags` override. Raises InputError for what
    cannot work.
    """
    config = check_model(model, num_steps)
    if token_map and not num_steps:
        raise InputError("--token-map: there is no draft to shorten with --no-spec; leave one of them out")
    if token_map and tp > 1:
        raise InputError(
            f"--token-map with --tp {tp}: SGLang indexes a head split over GPUs with whole-vocabulary ids and crashes or "
            "drafts wrong tokens (github.com/sgl-project/sglang/issues/4328); use --tp 1 or no map"
        )
    parts = ["--model-path", model, "--host", HOST, "--port", str(port), "--tp-size", str(tp)]
    attention = backend or attention_backend()
    parts += ["--attention-backend", attention, "--sampling-backend", "pytorch"]
    if "auto_map" in config and config.get("model_type") not in ("qwen2", "llama"):
        parts += ["--trust-remote-code"]
    if num_steps:
        parts += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(num_steps)]
        parts += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(num_steps + 1)]
    if num_steps and attention == "fa3":
        # With fa3 SGLang 0.5.17 runs the draft's extension without a CUDA graph.
        parts += ["--speculative-draft-attention-backend", "triton"]
    if token_map:
        # A path that does not exist would be taken for a Hub repository.
        parts += ["--speculative-token-map", str(existing(token_map, "token map").resolve())]
    return [sys.executable, "-m", "sglang.launch_server", *without(parts, flags), *flags]


def check_token_map(path: str, model: str) -> None:
    """InputError for a map of another tokenizer, or a file that is no map: SGLang would draft wrong tokens or
    crash.
    """
    draft_vocab.load_map(path, load_tokenizer(model), check_model(model, 1)["vocab_size"])


def vocab_environment(token_maps: str, policy: str, model: str, path: Path) -> dict[str, str]:
    """Write the draft vocabulary's file to `path`; the environment in which SGLang uses it
    (fastmtp.sglang_ext).

    Raises InputError for maps that do not fit the model, each other or the policy.
    """
    config = check_model(model, 1)
    draft_vocab.read(token_maps, policy, load_tokenizer(model), config["vocab_size"]).save(path)
    return extension(path)


def extension(path: Path) -> dict[str, str]:
    """The environment in which SGLang loads our draft model with the vocabulary in `path`."""
    return {
        EXTERNAL_PACKAGE: "fastmtp.sglang_ext",
        "FASTMTP_DRAFT_VOCAB": str(path.resolve()),
        "PYTHONPATH": python_path(),
    }


RENAMED = {"--cuda-graph-max-bs": "--cuda-graph-max-bs-decode"}  # the old name is gone after 0.5.17


def renamed(flags: list[str]) -> list[str]:
    """Flags under the names that every supported version knows."""
    split = [flag.partition("=") for flag in flags]
    return [RENAMED.get(name, name) + equals + value for name, equals, value in split]


def split_flags(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """A command's own arguments and, after `--`, SGLang's, under the names that every supported version
    knows.
    """
    ours, flags = split_at_dashes(argv)
    return ours, renamed(flags)


def without(parts: list[str], flags: list[str]) -> list[str]:
    """`parts` without the flags that the user gives: the printed command then shows each once."""
    given = {flag.partition("=")[0] for flag in flags if flag.startswith("--")}
    kept, skipping = [], False
    for part in parts:
        if part.startswith("--"):
            skipping = part in given
        if not skipping:
            kept.append(part)
    return kept
