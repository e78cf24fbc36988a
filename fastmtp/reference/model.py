"""One loader for a model folder in MiMo layout: the network, its tokenizer, and the ids that end an answer.

`check` reads config.json and the headers of the weights; `load` does that first, so a folder that cannot work
is refused before its weights are read. Nothing is made up: every tensor comes from the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from fastmtp.checkpoint import (
    HEAD_TENSORS,
    PREFIX,
    check_head,
    check_tied,
    check_weights,
    expected_shapes,
    head_state,
    read_head,
)
from fastmtp.cli import InputError
from fastmtp.formats.weights import check_finite, headers
from fastmtp.head.modeling_mimo import MiMoConfig, MiMoForCausalLM, MiMoMTPLayer
from fastmtp.inputs import existing, read_json
from fastmtp.tokenizer import check_fits, end_ids, load_tokenizer

CURE = "make the folder with fastmtp.prepare_model or fastmtp.export"


@dataclass
class Model:
    """A loaded model folder: the network, its tokenizer, and the ids that end an answer."""

    net: MiMoForCausalLM
    tokenizer: object
    eos_ids: set[int]


def check(folder: str | Path, device: str = "cpu") -> MiMoConfig:
    """The configuration of a MiMo-layout folder whose weights' headers fit it (`checkpoint.check_weights`).

    Raises InputError for any other folder, and for a device that PyTorch cannot use.
    """
    folder = existing(folder, "model folder")
    check_device(device)
    about = read_json(folder / "config.json")
    present = headers(folder).keys()
    body = expected_shapes(about, folder).keys() - HEAD_TENSORS
    if body <= present and HEAD_TENSORS.isdisjoint(present):
        raise InputError(f"{folder}: no {PREFIX}0 tensors, so there is no MTP head; {CURE}")
    check_weights(folder)
    try:
        # The folder's type is one that engines know; ours is the one with the head.
        config = MiMoConfig.from_dict({**about, "model_type": MiMoConfig.model_type})
        config.mtp_hidden = head_state(folder)
        _ = config.objective
        with torch.device("meta"):
            MiMoForCausalLM(config)
    except Exception as error:  # whatever a wrong value makes transformers or torch stumble over
        raise InputError(f"{folder / 'config.json'}: not usable ({_reason(error)}); {CURE}") from None
    return config


def check_device(device: str) -> None:
    """InputError for a name that is none, a GPU that is not there, or PyTorch's CPU build."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(
            f"--device {device}: PyTorch cannot use it on this machine; give cpu, or cuda if there is a GPU"
        ) from None


def load(folder: str | Path, dtype: str = "float32", device: str = "cpu") -> Model:
    """Load a MiMo-layout folder, head included, after `check`. InputError also for NaN and infinity."""
    config = check(folder, device)
    tokenizer = load_tokenizer(folder)
    check_fits(folder, tokenizer, config.vocab_size)
    check_tied(headers(folder), config.to_dict(), folder)
    # Our one line on an error must not drown in the library's report.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        net, info = MiMoForCausalLM.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
        net = net.to(device).eval()
    except Exception as error:  # out of memory, or a layout of files that transformers does not know
        raise InputError(f"{folder}: cannot be loaded in {dtype} on {device} ({_reason(error)})") from None
    made_up = sorted(info["missing_keys"])
    if made_up:
        raise InputError(
            f"{folder}: transformers does not find {made_up[0]} ({len(made_up)} missing); {CURE}"
        )
    check_finite(net.state_dict().items(), folder)
    return Model(net, tokenizer, end_ids(folder, tokenizer))


def head_for(name: str | Path, config: MiMoConfig) -> dict[str, Tensor]:
    """The head of a checkpoint, a model or the package (`checkpoint.read_head`), fit for a model.

    Raises InputError for a head of other shapes, of integers, or one that holds NaN or infinity.
    """
    tensors = read_head(name)
    check_head(tensors, config.to_dict(), name)
    return tensors


def put_head(net: MiMoForCausalLM, name: str | Path, tensors: dict[str, Tensor]) -> None:
    """Replace the head of `net` by that of `name` (`head_for`), and feed it with what it was trained on."""
    net.load_head(tensors)
    net.config.mtp_hidden = head_state(name)
    _ = net.config.objective


def take_over(head: MiMoMTPLayer, layer: dict[str, Tensor], input_proj: Tensor, final_norm: Tensor) -> None:
    """Make `head` the decoder layer `layer` (names within it), fed through `input_proj` [H, 2H]; ones as the
    streams' norms.
    """
    ones = torch.ones_like(final_norm)
    own = {
        "input_proj": input_proj,
        "token_layernorm": ones,
        "hidden_layernorm": ones,
        "final_layernorm": final_norm,
    }
    head.load_state_dict(layer | {f"{name}.weight": tensor for name, tensor in own.items()}, strict=True)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
