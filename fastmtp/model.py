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

from fastmtp import files, weights
from fastmtp.checkpoint import PREFIX, read_head
from fastmtp.cli import InputError
from fastmtp.head.modeling_mimo import MiMoConfig, MiMoForCausalLM
from fastmtp.tokenizer import end_ids, load_tokenizer

CURE = "make the folder with fastmtp.prepare_model or fastmtp.export"


@dataclass
class Model:
    """A loaded model folder: the network, its tokenizer, and the ids that end an answer."""

    net: MiMoForCausalLM
    tokenizer: object
    eos_ids: set[int]


def check(folder: str | Path, device: str = "cpu") -> MiMoConfig:
    """The configuration of a MiMo-layout folder whose weights' headers fit it.

    Raises InputError for a missing folder or head, quantised weights, missing, unexpected, misshapen or torn
    tensors, and a device that PyTorch cannot use.
    """
    folder = files.existing(folder, "model folder")
    check_device(device)
    about = files.read_json(folder / "config.json")
    weights.refuse_quantised(folder, about)
    try:
        # The folder's type is one that engines know; ours is the one with the head.
        config = MiMoConfig.from_dict({**about, "model_type": MiMoConfig.model_type})
        shapes = tensor_shapes(config)
    except Exception as error:  # whatever a wrong value makes transformers or torch stumble over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{folder / 'config.json'}: not a model's configuration ({reason}); {CURE}"
        ) from None
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    weights.check(folder, shapes, tied, CURE)
    return config


def check_device(device: str) -> None:
    """InputError for a name that is none, a GPU that is not there, or PyTorch's CPU build."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(
            f"--device {device}: PyTorch cannot use it on this machine; give cpu, or cuda if there is a GPU"
        ) from None


def tensor_shapes(config: MiMoConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model with this configuration, by name; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in MiMoForCausalLM(config).state_dict().items()}


def load(folder: str | Path, dtype: str = "float32", device: str = "cpu") -> Model:
    """Load a MiMo-layout folder, head included, after `check`. InputError also for NaN and infinity."""
    config = check(folder, device)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(folder, tokenizer, config.vocab_size)
    # Our one line on an error must not drown in the library's report.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        net, info = MiMoForCausalLM.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
        net = net.to(device).eval()
    except torch.OutOfMemoryError:
        raise InputError(f"{folder}: too large for {device} in {dtype}; give a smaller model") from None
    if info["missing_keys"] or info["unexpected_keys"]:  # what the headers did not show
        names = weights.shown([*info["missing_keys"], *info["unexpected_keys"]])
        raise InputError(f"{folder}: transformers does not load {names} as it lies there; {CURE}")
    check_finite(folder, net.state_dict())
    return Model(net, tokenizer, end_ids(folder, tokenizer))


def check_tokenizer(folder: str | Path, tokenizer, vocab_size: int) -> None:
    """InputError for a tokenizer with ids that the model has no embedding of."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has the id {largest}, the model only {vocab_size}; "
            "copy tokenizer and weights of one model"
        )


def check_finite(folder: str | Path, tensors: dict[str, Tensor]) -> None:
    """InputError naming the tensors that hold NaN or infinity."""
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise InputError(f"{folder}: NaN or infinity in {weights.shown(broken)}; copy or train it again")


def head_for(name: str | Path, config: MiMoConfig) -> dict[str, Tensor]:
    """The head of a checkpoint, a model or the package (`checkpoint.read_head`), fit for a model.

    Raises InputError for a head of other shapes, or one that holds NaN or infinity.
    """
    tensors = read_head(name)
    for tensor, shape in tensor_shapes(config).items():
        if tensor.startswith(PREFIX) and tuple(tensors[tensor].shape) != shape:
            raise InputError(
                f"{name}: a head for another model: {tensor} has the shape {list(tensors[tensor].shape)}, "
                f"this model needs {list(shape)}"
            )
    check_finite(name, tensors)
    return tensors
