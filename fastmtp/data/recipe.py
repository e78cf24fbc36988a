"""A recipe for `swift sft`: read, completed from its base, overridden, given what any head training needs.

`base: base.yaml` in a recipe names a file beside it (or in configs/) with the keys that recipes share. What
must hold for any head is fixed here, in FIXED and REFUSED: a recipe need not say it, and one that says
otherwise is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from fastmtp.cli import InputError
from fastmtp.formats.yaml_file import read_mapping
from fastmtp.head.modeling_mimo import SETTINGS
from fastmtp.inputs import resource

HEAD_KEYS = (*SETTINGS, "mtp_eval_data", "mtp_eval_limit", "mtp_compile", "mtp_flash_attn")
PLUGIN = "fastmtp/swift_plugin.py"
FIXED = {
    "model_type": "fastmtp_mimo",
    "tuner_type": "full",
    "freeze_parameters": ["model", "lm_head"],  # the head alone is trained
    "trainable_parameters": ["model.mtp_layers"],
    "add_version": False,  # or output_dir gets a time in its name, and nothing could be resumed
    "check_model": False,  # or ms-swift asks its hub about a local folder for 20 seconds
    "use_logits_to_keep": False,  # or targets between two answers would be another turn's
    "strict": True,  # or ms-swift replaces a row that it cannot encode by another
}
REFUSED = {  # key -> (its only value here, why)
    "template": ("fastmtp_mimo", "the model's own chat template is used"),
    "loss_scale": ("default", 'all answers count; mark a turn with "loss": false instead'),
    "streaming": (False, "rows are checked and counted before the training starts"),
    "split_dataset_ratio": (0, "give a val_dataset"),
    "interleave_prob": (None, "mix the rows with fastmtp.curate"),
    "cached_dataset": ([], "give the rows as dataset"),
    "cached_val_dataset": ([], "give the rows as val_dataset"),
    "resume_only_model": (False, "export the checkpoint and train from that folder"),
    "save_only_model": (False, "a checkpoint without optimizer.pt cannot be continued"),
}
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 takes 1e-5 for a text


def read_recipe(path: str | Path) -> dict:
    """A recipe file as a dict, its base included. InputError if one of them is missing or not a recipe."""
    path = resource(path)
    return with_base(read_mapping(path, "recipe"), path)


def with_base(recipe: dict, path: str | Path) -> dict:
    """A recipe that is read from the file `path`, over the one that its key `base` names."""
    recipe = dict(recipe)
    base = recipe.pop("base", None)
    if base is None:
        return recipe
    if not isinstance(base, str):
        raise InputError(f"{path}: 'base' must be the name of a recipe beside this one, not {base!r}")
    file = Path(path).parent / base
    if not file.exists():  # a recipe copied elsewhere: its base is still the project's
        file = resource(Path("configs") / base)
    common = read_mapping(file, f"recipe ('base' in {path})")
    if "base" in common:
        raise InputError(f"{file}: a base has no base of its own; write its keys here")
    return merge(common, recipe)


def merge(common: dict, own: dict) -> dict:
    """The keys of both; what `own` says counts. The head's keys (`model_kwargs`) are merged one by one."""
    head = {**(common.get("model_kwargs") or {}), **(own.get("model_kwargs") or {})}
    return {**common, **own, **({"model_kwargs": head} if head else {})}


def apply_overrides(recipe: dict, overrides: Sequence[str]) -> dict:
    """`--key value ...` over a recipe; head keys go to `model_kwargs`.

    Raises InputError for a key without a value and a value without a key.
    """
    recipe = {**recipe, "model_kwargs": dict(recipe.get("model_kwargs") or {})}
    values: dict[str, list] = {}
    for word in overrides:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = values[name.replace("-", "_")] = [_value(value)] if equals else []
        elif not values:
            raise InputError(f"'{word}' comes before any --key; write overrides as --key value")
        else:
            current.append(_value(word))
    for key, value in values.items():
        if not value:
            raise InputError(f"--{key} has no value; write overrides as --key value")
        if key in HEAD_KEYS:
            recipe["model_kwargs"][key] = value[0]
        else:
            recipe[key] = value if len(value) > 1 or isinstance(recipe.get(key), list) else value[0]
    return recipe


def _value(word: str) -> object:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word  # a text such as "[draft" or "50%"


def complete(recipe: dict, place: str) -> dict:
    """The recipe with all that must hold for any head. InputError, by name, if it says otherwise."""
    recipe = {key: _number(value) for key, value in recipe.items()}
    if isinstance(recipe.get("model_kwargs"), dict):
        recipe["model_kwargs"] = {key: _number(value) for key, value in recipe["model_kwargs"].items()}
    packed = recipe.get("packing") or recipe.get("padding_free")
    # ms-swift packs under this name alone; the model has its own attention over packed documents
    fixed = {**FIXED, "attn_impl": "flash_attn" if packed else "sdpa"}
    for key, value in fixed.items():
        said = recipe.get(key, value)
        said = said.split() if isinstance(value, list) and isinstance(said, str) else said
        if said != value and not (key == "attn_impl" and said in ("flash_attn", "sdpa") and not packed):
            raise InputError(f"{place}: {key} must be {_shown(value)} to train a head; leave the key out")
    for key, (value, reason) in REFUSED.items():
        if (recipe.get(key, value) or value) != value:
            raise InputError(f"{place}: {key}: {_shown(recipe[key])} is not supported; {reason}")
    if recipe.get("truncation_strategy") not in (None, "delete", "left", "right"):
        raise InputError(f"{place}: truncation_strategy must be delete, left or right")
    if (
        recipe.get("save_strategy") == "no" or recipe.get("save_strategy") is False
    ):  # YAML reads `no` as false
        raise InputError(f"{place}: save_strategy: no would keep nothing of the training; leave the key out")
    plugins = recipe.get("external_plugins") or []
    plugins = [plugins] if isinstance(plugins, str) else plugins
    others = [path for path in plugins if Path(path).parts[-2:] != Path(PLUGIN).parts]
    for key in (
        "fsdp",
        "deepspeed",
    ):  # a file of the project, a name such as zero2, or the settings themselves
        if isinstance(recipe.get(key), str):
            recipe[key] = str(resource(recipe[key]))
    return {**recipe, **fixed, "external_plugins": [str(resource(PLUGIN)), *others]}


def _number(value: object) -> object:
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _shown(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
