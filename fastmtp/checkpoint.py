"""What a head checkpoint is: its tensor names, where it lies, how it is read and written.

A checkpoint folder holds the head alone, under the names of the released MiMo-7B checkpoints; a model folder
holds it beside the backbone. Heads that come with the package are found by name.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.tokenizer import check_same, different, load_tokenizer

PREFIX = "model.mtp_layers."
HEADS = Path(__file__).with_name("heads")  # heads that come with the package, by folder name
HEAD_FILE = "mtp_head.safetensors"
BACKBONE_FILE = (
    "backbone.safetensors"  # transformers takes a file named model.safetensors for the whole model
)
HEAD_TENSORS = frozenset(
    f"{PREFIX}0.{name}"
    for name in (
        *(f"{norm}.weight" for norm in ("token_layernorm", "hidden_layernorm", "input_layernorm")),
        *(f"{norm}.weight" for norm in ("post_attention_layernorm", "final_layernorm")),
        *("input_proj.weight", "self_attn.o_proj.weight"),
        *(f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    )
)
CODE = sorted(
    p for p in Path(__file__).with_name("head").glob("*.py") if p.name != "__init__.py"
)  # travel with a checkpoint
INDEX = "model.safetensors.index.json"
CONTRACT_KEY = "fastmtp"  # in config.json of folders whose head is ours: what the head was trained on
CONTRACT = {"mtp_hidden": "post_norm"}  # the backbone's state after its final norm; vLLM's own MiMo differs
ENGINE_TYPES = ("qwen2", "llama")  # qwen2: transformers rebuilds the tokenizer
SKIP = {"config.json", INDEX, "run.json", *(path.name for path in CODE)}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model or checkpoint folder. Raises InputError where there are none."""
    found = sorted(files.existing(folder, "folder").glob("*.safetensors"))
    if not found:
        raise InputError(f"{folder}: no .safetensors file; give a model or checkpoint folder")
    return found


def head_folder(name: str | Path) -> Path:
    """The folder of a checkpoint, a model, or a head of the package, such as `smollm2-vanilla`."""
    return Path(name) if Path(name).exists() or not (HEADS / name).is_dir() else HEADS / name


def read_head(folder: str | Path) -> dict[str, torch.Tensor]:
    """Head tensors by full name, of what `head_folder` finds. InputError unless they are exactly a head."""
    folder = head_folder(folder)
    head = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                head |= {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(PREFIX)}
        except SafetensorError as error:
            raise InputError(f"{path}: not a readable safetensors file ({error}); copy it again") from None
    if head.keys() != HEAD_TENSORS:
        missing, extra = sorted(HEAD_TENSORS - head.keys()), sorted(head.keys() - HEAD_TENSORS)
        what = (
            f"lacks {missing[0]} ({len(missing)} missing)" if missing else f"has an unknown tensor {extra[0]}"
        )
        raise InputError(
            f"{folder}: not a checkpoint of an MTP head: {what}; give the folder that training wrote"
        )
    return head


def is_post_norm(config: dict) -> bool:
    """Whether a folder's config.json says that its head expects the state after the final norm."""
    contract = config.get(CONTRACT_KEY)
    return isinstance(contract, dict) and contract.get("mtp_hidden") == "post_norm"


def finish_folder(folder: Path, config: dict, tokenizer=None) -> None:
    """Write config.json as engines want it, and the modelling files beside it.

    With `tokenizer`, the model type is one with which transformers reads its ids from the folder. Raises
    InputError if there is none.
    """
    own = config.get("model_type")
    types = [own, *ENGINE_TYPES] if own in ENGINE_TYPES else [*ENGINE_TYPES]
    for model_type in dict.fromkeys(types):
        _write_config(folder, config, model_type)
        if tokenizer is None or different(tokenizer, load_tokenizer(folder)) is None:
            break
    else:
        check_same(folder, tokenizer)
    for path in CODE:
        shutil.copyfile(path, folder / path.name)


def _write_config(folder: Path, config: dict, model_type: str) -> None:
    dropped = ("_name_or_path", "quantization_config", "transformers_version")
    before = {name: value for name, value in config.items() if name not in dropped}
    own = before.get("model_type")
    config = before | {
        # engines know the type without remote code; the architecture's name brings the head
        "model_type": model_type,
        "architectures": ["MiMoForCausalLM"],
        "num_nextn_predict_layers": 1,
        "auto_map": {
            "AutoConfig": "modeling_mimo.MiMoConfig",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
        },
        "use_cache": True,
    }
    if model_type == "llama":  # a Llama source's q/k/v biases are zeros that a plain Llama does not need
        config["attention_bias"] = before.get("attention_bias", False) if own == "llama" else True
        config.setdefault("mlp_bias", False)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # older readers look for it at the top
        config["rope_theta"] = rope["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def link(source: Path, target: Path) -> None:
    """Hard-link a weight file, which costs nothing; copy across file systems."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def save_head(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a head's tensors into `folder`, as training leaves them: one file, full names."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
