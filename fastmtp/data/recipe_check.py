"""Numbers and settings of a recipe that would train nothing, or that ms-swift would stumble over later."""

from __future__ import annotations

import difflib
from pathlib import Path

from fastmtp.budget.shapes import head_dim
from fastmtp.cli import InputError
from fastmtp.data.recipe import HEAD_KEYS
from fastmtp.engines.sglang import compute_capability
from fastmtp.head.modeling_mimo import SETTINGS, MiMoConfig
from fastmtp.head.recursion import ATTENTIONS
from fastmtp.head.varlen import load_flash_attn
from fastmtp.inputs import read_json

ABOVE_ZERO = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "max_length")
WHOLE = (
    "dataset_num_proc",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing_length",
)
SEEDS = ("seed", "data_seed")
# What FlashAttention 4 was compared with the dense reference on: GPUs of Hopper, and widths of a head.
FLASH_CAPABILITY, FLASH_WIDTHS = "9.0", (64, 128)
AT_LEAST_ONE = (
    "dataset_num_proc",
    "gradient_accumulation_steps",
    "packing_length",
    "save_steps",
    "logging_steps",
)


def check_keys(recipe: dict, known: set[str], place: str) -> None:
    """InputError for a key that neither ms-swift (`known`) nor the head has."""
    for settings, allowed in ((recipe, known), (recipe.get("model_kwargs") or {}, set(HEAD_KEYS))):
        if not isinstance(settings, dict):
            raise InputError(f"{place}: 'model_kwargs' must be a block of the head's settings")
        for key in settings:
            if key not in allowed:
                near = difflib.get_close_matches(key, {*allowed, *HEAD_KEYS}, 1)
                own = f"the head's settings are {', '.join(HEAD_KEYS)}"
                other = own if key.startswith("mtp_") else "see `swift sft --help`"
                hint = f"did you mean '{near[0]}'?" if near else other
                raise InputError(f"{place}: unknown key '{key}'; {hint}")


def check_numbers(recipe: dict, place: str) -> None:
    """InputError for a number that would train nothing, or that ms-swift would stumble over later."""
    for key in SEEDS:
        value = recipe.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 32):
            raise InputError(f"{place}: {key} must be a whole number from 0 on, not {value!r}")
    for key in (*ABOVE_ZERO, *AT_LEAST_ONE, "max_steps"):
        value = recipe.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{place}: {key} must be a number, not {value!r}")
        if key in ABOVE_ZERO and not value > 0:
            raise InputError(f"{place}: {key} must be above 0, not {value}; nothing would be trained")
        if key in WHOLE and value != int(value):
            raise InputError(f"{place}: {key} must be a whole number, not {value}")
        if key in AT_LEAST_ONE and key not in ("save_steps", "logging_steps") and value < 1:
            raise InputError(f"{place}: {key} must be at least 1, not {value}")
        if key == "max_steps" and value != -1 and (value < 1 or value != int(value)):
            raise InputError(f"{place}: max_steps must be a whole number of at least 1, not {value}")


def check_warmup(recipe: dict, place: str) -> None:
    """InputError for a warmup as long as the training: the learning rate would not get off the ground."""
    steps, share = recipe.get("warmup_steps") or 0, recipe.get("warmup_ratio") or 0
    for name, value in (("warmup_steps", steps), ("warmup_ratio", share)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise InputError(f"{place}: {name} must be a number from 0 on, not {value!r}")
    last = recipe.get("max_steps") or 0
    if share >= 1 or last > 0 and steps >= last:
        name, value, end = ("warmup_ratio", share, 1) if share >= 1 else ("warmup_steps", steps, last)
        raise InputError(f"{place}: {name} must be below {end}, not {value}; nothing would be trained")


def check_head(head: dict, place: str) -> None:
    """InputError for settings of the head that its configuration does not take."""
    steps, attention = head.get("mtp_num_steps"), head.get("mtp_attention")
    for name, value in (("mtp_num_steps", steps), ("mtp_eval_limit", head.get("mtp_eval_limit", 1))):
        if type(value) is not int or value < 1:
            raise InputError(f"{place}: {name} must be a whole number of at least 1, not {value}")
    for name in ("mtp_compile", "mtp_flash_attn"):
        if not isinstance(head.get(name, False), bool):
            raise InputError(f"{place}: {name} must be true or false, not {head[name]}")
    if head.get("mtp_flash_attn"):
        if head.get("mtp_compile"):
            raise InputError(f"{place}: flash-attn's kernels cannot be compiled; leave mtp_compile out")
        if fault := flash_attn_fault():
            cure = "run: pip install -e '.[flash]', or leave the key out"
            raise InputError(f"{place}: mtp_flash_attn: flash-attn-4 does not load here ({fault}); {cure}")
    if attention not in ATTENTIONS:
        raise InputError(f"{place}: mtp_attention must be one of {', '.join(ATTENTIONS)}, not {attention}")
    try:
        _ = MiMoConfig(**{name: value for name, value in head.items() if name in SETTINGS}).objective
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None


def takes_flash_attn(recipe: dict) -> bool:
    """Whether attention on a GPU goes through FlashAttention 4: as `mtp_flash_attn` says; if it says nothing,
    where FlashAttention 4 loads and was compared with the dense reference on such a GPU (the first that
    nvidia-smi lists) and with heads of the model's width.
    """
    head = recipe["model_kwargs"]
    if "mtp_flash_attn" in head:
        return head["mtp_flash_attn"]
    width = head_dim(read_json(Path(recipe["model"]) / "config.json"))
    if head.get("mtp_compile") or width not in FLASH_WIDTHS:
        return False
    return compute_capability() == FLASH_CAPABILITY and flash_attn_fault() is None


def flash_attn_fault() -> str | None:
    """Why FlashAttention 4 cannot be loaded here, None if it can.

    Loading is the only test that tells: flash-attn 2 has the same top name, other packages bring copies of
    `flash_attn.cute` without the compiler that it needs.
    """
    try:
        load_flash_attn()
    except Exception as error:  # the compiler's own errors too
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
