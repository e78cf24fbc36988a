"""SGLang: its command line for our folders, and what must be checked before minutes are spent on a start.

Built for 0.5.17 or later. Every command that starts SGLang gets its command line from `command`, which calls
`check`: what cannot work is refused, whether it is said with our options or with SGLang's flags after `--`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from fastmtp.checkout import python_path
from fastmtp.checkpoint import CONTRACT_KEY
from fastmtp.cli import InputError
from fastmtp.engines.address import check_host, check_port
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang_flags import ALIASES, canonical, merged, values
from fastmtp.engines.sglang_flags import split_flags as split_flags
from fastmtp.engines.sglang_flags import without as without
from fastmtp.inputs import existing, read_json
from fastmtp.tokenizer import load_tokenizer
from fastmtp.trees.tree import DynamicTree
from fastmtp.vocab import draft_vocab

OLDEST = (0, 5, 17)
PACKAGE = "fastmtp.sglang_ext"
EXTERNAL_PACKAGE = "SGLANG_EXTERNAL_MODEL_PACKAGE"  # SGLang takes models of this package before its own
VOCAB_READY = "draft vocabulary: ready"  # what fastmtp.sglang_ext logs once it is in use
FAST_TREE = "FASTMTP_FAST_TREE"  # which of fastmtp.sglang_ext.fast_tree's kernels: 1 for all, 0 for none
FAST_TREE_VERSION = "0.5.17"  # of SGLang, whose functions these kernels replace

TREE = "the tree (--tree, or @tree of an arm), or leave it out"
# Flags that our own options decide: after `--` they may repeat what those say and nothing else.
OURS = {
    "--model-path": "--model",
    "--host": "--host (serve), or leave it out: this command asks its own server",
    "--port": "--port",
    "--speculative-token-map": "--token-map",
    "--speculative-num-steps": "the number of steps (--num-steps, or K of an arm)",
    "--speculative-eagle-topk": TREE,
    "--speculative-num-draft-tokens": TREE,
    "--speculative-adaptive": "--adaptive",
    "--speculative-adaptive-config": "--adaptive, with --plan for a table of your own",
}
# Of speculative decoding: what drafts that keep the text need. Lower thresholds accept drafts that the model
# would not say.
LOSSLESS = {
    "--speculative-algorithm": ("EAGLE", "NEXTN"),
    "--speculative-accept-threshold-single": ("1", "1.0"),
    "--speculative-accept-threshold-acc": ("1", "1.0"),
}
REFUSED = {
    "--config": "its file could say anything; write its flags out",
    "--api-key": "it would be printed; give --api-key of fastmtp.serve before --, or FASTMTP_API_KEY",
    "--admin-api-key": "it would be printed; start SGLang yourself for a server with an admin's key",
    "--speculative-draft-model-path": "the head in the model folder is the draft; leave it out",
}
# With these SGLang drops --speculative-adaptive and only logs it.
STEADY = ("--enable-dp-attention", "--enable-two-batch-overlap", "--enable-pdmux")
ADAPTIVE_STEPS = 7  # the most that SGLang's own table takes; its buffers hold what it starts with
GUARDED = (*OURS, *LOSSLESS, *REFUSED, *STEADY, "--tp-size", "--dp-size", "--trust-remote-code")


def sglang_version() -> str:
    """Version of the installed SGLang. Raises InputError if there is none, or one too old."""
    version = _installed_version()
    if version is None:
        raise InputError("SGLang is not installed; pip install -e '.[serve]' on a machine with a GPU")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise InputError(f"SGLang {version} is too old; pip install 'sglang>={'.'.join(map(str, OLDEST))}'")
    return version


def attention_backend() -> str:
    """fa3 if its kernels are installed and the GPU is Hopper, which alone runs them; else triton.

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
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.split("\n")[0].strip()


def check_model(folder: str, num_steps: int, flags: Sequence[str] = ()) -> dict:
    """The folder's config. Raises InputError for what SGLang would only reveal minutes later, or never."""
    path = existing(existing(folder, "model folder") / "config.json", "model config")
    config = read_json(path)
    if num_steps and "MiMoForCausalLM" not in (config.get("architectures") or []):
        raise InputError(
            f"{path}: architectures is {config.get('architectures')}; export with fastmtp.export, or "
            f"--no-spec"
        )
    if num_steps and config.get("num_nextn_predict_layers") != 1:
        # SGLang would allocate the draft's KV cache for every layer of the backbone.
        layers = config.get("num_nextn_predict_layers")
        raise InputError(f"{path}: num_nextn_predict_layers is {layers}, must be 1; export the model again")
    kind = config.get("model_type")
    if "auto_map" in config and kind not in CONFIG_MAPPING_NAMES and "--trust-remote-code" not in flags:
        raise InputError(
            f"{path}: model_type '{kind}' needs code from this folder; make one that needs none with "
            "fastmtp.prepare_model, or read that code, then add -- --trust-remote-code"
        )
    return config


def check(serving: Serving) -> dict:
    """The model's config. InputError for what cannot work, however it was said."""
    model, num_steps, flags = serving.model, serving.num_steps, canonical(serving.flags)
    token_map, token_maps = serving.token_map, serving.token_maps
    check_port(serving.port)
    check_host(serving.host, serving.port)
    config = check_model(model, num_steps, flags)
    contract = config.get(CONTRACT_KEY)
    if num_steps and isinstance(contract, dict) and contract.get("mtp_hidden") == "pre_norm":
        raise InputError(
            f"{model}: its head was trained on the state before the final norm, and SGLang hands over the "
            "one after it; serve it with --engine vllm, or train it with mtp_hidden post_norm"
        )
    check_flags(flags, num_steps, values(chosen(serving)))
    said = values(flags)
    check_drafts(serving, said)
    if (token_map or token_maps) and not num_steps:
        name = "--token-map" if token_map else "--token-maps"
        raise InputError(f"{name} without drafts: there is nothing to shorten; leave the map out")
    tp = whole("--tp", said.get("--tp-size", serving.tp))
    if token_map and tp > 1:
        raise InputError(
            f"--token-map with --tp {tp}: SGLang indexes a head split over GPUs with whole-vocabulary ids, "
            "and crashes or drafts wrong tokens (github.com/sgl-project/sglang/issues/4328); use --tp 1, or "
            "no map"
        )
    if token_maps and "--enable-dp-attention" in said:
        raise InputError(
            "--token-maps with --enable-dp-attention: its ranks run different requests on one head; use one"
        )
    paths = [token_map] if token_map else draft_vocab.parse_maps(token_maps).values() if token_maps else []
    for path in paths:
        ids = draft_vocab.load_map(path, said.get("--tokenizer-path", model), vocabulary(model, config))
        if serving.tree and serving.tree.topk > len(ids):
            raise InputError(f"{path}: {len(ids)} ids are too few for a tree of topk {serving.tree.topk}")
    return config


def check_drafts(serving: Serving, said: dict[str, str]) -> None:
    """InputError for a tree, or changing steps, that SGLang would drop or refuse. said: its own flags."""
    if serving.tree and serving.tree.depth != serving.num_steps:
        raise InputError(
            f"the tree is {serving.tree.depth} drafts deep, not {serving.num_steps}; leave the steps out"
        )
    if not serving.adaptive:
        return
    if serving.tree:
        raise InputError("--adaptive with a tree: SGLang changes the length of chains alone; leave one out")
    if not serving.table and serving.num_steps != ADAPTIVE_STEPS:
        raise InputError(
            f"--adaptive with --num-steps {serving.num_steps}: SGLang starts with the most steps of its "
            f"table, {ADAPTIVE_STEPS}; leave the steps out, or give --plan"
        )
    if dropped := [flag for flag in STEADY if flag in said]:
        raise InputError(
            f"--adaptive with {dropped[0]}: SGLang keeps one number of steps then; leave one out"
        )


def check_flags(flags: Sequence[str], num_steps: int, own: dict[str, str]) -> None:
    """InputError for a flag of SGLang's that contradicts what our options say (`own`), or is abbreviated."""
    if flags and not (flags[0].startswith("--") and flags[0] != "--"):
        raise InputError(f"-- {flags[0]}: not a flag of SGLang's; its flags begin with two dashes and a name")
    for name, value in values(flags).items():
        full = next((g for g in (*GUARDED, *ALIASES) if g.startswith(name)), None)
        if full and name not in (*GUARDED, *ALIASES):
            raise InputError(f"-- {name}: abbreviated; write the flag out, such as {full}")
        if name in REFUSED:
            raise InputError(f"-- {name}: {REFUSED[name]}")
        if not num_steps and name.startswith("--speculative-") and name in (*OURS, *LOSSLESS):
            raise InputError(f"-- {name} {value}: plain decoding has no drafts; leave it out")
        if name in OURS and value != own.get(name):
            raise InputError(
                f"{name} {value} after --: contradicts this command's own options; give {OURS[name]}"
            )
        if name in LOSSLESS and value not in LOSSLESS[name]:
            raise InputError(f"-- {name} {value}: must be {LOSSLESS[name][0]} for drafts that keep the text")


def whole(name: str, value: object) -> int:
    """A number of GPUs. Raises InputError for anything else."""
    if not (str(value).isascii() and str(value).isdigit() and int(value) > 0):
        raise InputError(f"{name} {value}: must be a whole number of at least 1")
    return int(value)


def vocabulary(model: str, config: dict) -> int:
    """Rows of the model's output matrix."""
    size = config.get("vocab_size")
    if type(size) is not int or size < 1:
        raise InputError(f"{model}/config.json: vocab_size is {size}; export the model again")
    return size


def chosen(serving: Serving) -> list[str]:
    """The flags that our options decide."""
    parts = ["--model-path", serving.model, "--host", serving.host, "--port", str(serving.port)]
    if not serving.num_steps:
        return parts
    tree, steps = serving.tree, serving.num_steps
    topk, nodes = (tree.topk, tree.nodes) if tree else (1, steps + 1)
    parts += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(steps)]
    parts += ["--speculative-eagle-topk", str(topk), "--speculative-num-draft-tokens", str(nodes)]
    if serving.adaptive:
        parts += ["--speculative-adaptive"]
    if serving.table:
        parts += ["--speculative-adaptive-config", str(Path(serving.table).resolve())]
    if serving.token_map:
        # A path that does not exist would be taken for a Hub repository.
        parts += ["--speculative-token-map", str(Path(serving.token_map).resolve())]
    return parts


def command(serving: Serving, backend: str | None = None) -> list[str]:
    """SGLang's command line. backend: for attention. Raises InputError as `check` does."""
    check(serving)
    parts = [*chosen(serving), "--tp-size", str(serving.tp)]
    attention = backend or attention_backend()
    parts += ["--attention-backend", attention, "--sampling-backend", "pytorch"]
    parts += sampled_drafts(serving) if serving.sampled else []
    if serving.num_steps and attention == "fa3":
        # With fa3 SGLang 0.5.17 runs the draft's extension without a CUDA graph.
        parts += ["--speculative-draft-attention-backend", "triton"]
    return [sys.executable, "-m", "sglang.launch_server", *merged(parts, canonical(serving.flags))]


def sampled_drafts(serving: Serving) -> list[str]:
    """The flag for sampled drafts. InputError for what SGLang refuses together with it."""
    if serving.tree:
        raise InputError("sampled drafts with a tree: SGLang draws chains alone; leave one out")
    if serving.token_map:
        raise InputError(
            "sampled drafts with --token-map: SGLang's own map gives no distribution; use --token-maps"
        )
    if "--enable-deterministic-inference" in values(canonical(serving.flags)):
        raise InputError(
            "sampled drafts with --enable-deterministic-inference, which float32 needs: SGLang refuses them "
            "together; use bfloat16, or greedy drafts"
        )
    return ["--speculative-use-rejection-sampling"]


def vocab_environment(token_maps: str, policy: str, model: str, path: Path) -> dict[str, str]:
    """Write the draft vocabulary's file to `path`; the environment in which SGLang uses it
    (fastmtp.sglang_ext).

    Raises InputError for maps that do not fit the model, each other or the policy.
    """
    rows = vocabulary(model, check_model(model, 1))
    draft_vocab.read(token_maps, policy, load_tokenizer(model), rows).save(path)
    return extension(path)


def extension(path: Path) -> dict[str, str]:
    """The environment in which SGLang loads our draft model with the vocabulary in `path`."""
    return {"FASTMTP_DRAFT_VOCAB": str(path.resolve())} | _package()


def tree_environment(tree: DynamicTree | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment in which SGLang drafts and verifies `tree` with our kernels, if its version is theirs.

    FASTMTP_FAST_TREE, in `more` or this process, decides first; a model package of the user's own stays.
    """
    said = os.environ | dict(more or {})
    version = _installed_version()
    parts = said.get(FAST_TREE, "1" if version == FAST_TREE_VERSION else "0")
    if not tree or parts in ("", "0") or said.get(EXTERNAL_PACKAGE, PACKAGE) != PACKAGE:
        return {}
    return {FAST_TREE: parts} | _package()


def _package() -> dict[str, str]:
    """The environment in which SGLang finds our models before its own."""
    return {EXTERNAL_PACKAGE: PACKAGE, "PYTHONPATH": python_path()}


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None
