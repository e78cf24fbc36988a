"""Fine-tune the head: check a recipe, then run `swift sft` on it (stock ms-swift, our plugin).

A recipe is a complete ms-swift YAML; the head's settings are its `model_kwargs` (modeling_mimo.MiMoConfig's
mtp_*). With `mtp_eval_data`, held-out samples of which `mtp_eval_limit` are used, tau is measured at every
checkpoint, and the link `best-checkpoint` keeps the best; `mtp_compile: true` compiles the layers. Overrides
are flags of the same names. An unknown key is an error.

    python -m fastmtp.train configs/mimo7b_k3.yaml --learning_rate 1e-4 --mtp_num_steps 5
    NPROC_PER_NODE=8 python -m fastmtp.train configs/mimo7b_k3.yaml --resume_from_checkpoint runs/mimo7b_k3/last-checkpoint
"""

from __future__ import annotations

import difflib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from fastmtp import files
from fastmtp.checkpoint import read_head
from fastmtp.cli import InputError, Parser, run
from fastmtp.head.modeling_mimo import SETTINGS, MiMoConfig
from fastmtp.head.recursion import ATTENTIONS
from fastmtp.yaml_file import read_mapping

HEAD_KEYS = (*SETTINGS, "mtp_eval_data", "mtp_eval_limit", "mtp_compile")
NEEDED = ("model", "model_type", "external_plugins", "dataset", "output_dir", "model_kwargs")


def apply_overrides(recipe: dict, overrides: Sequence[str]) -> dict:
    """`--key value ...` over a recipe; head keys go to `model_kwargs`. InputError for a value without its
    key.
    """
    recipe = {**recipe, "model_kwargs": dict(recipe.get("model_kwargs") or {})}
    values: dict[str, list] = {}
    for word in overrides:
        if word.startswith("--"):
            current = values[word[2:].replace("-", "_")] = []
        elif not values:
            raise InputError(f"'{word}' stands before any --key; write overrides as --key value")
        else:
            current.append(yaml.safe_load(word))
    for key, value in values.items():
        if not value:
            raise InputError(f"--{key} has no value; write overrides as --key value")
        if key in HEAD_KEYS:
            recipe["model_kwargs"][key] = value[0]
        else:
            recipe[key] = value if len(value) > 1 or isinstance(recipe.get(key), list) else value[0]
    return recipe


def check(recipe: dict, known: set[str], where: str) -> None:
    """InputError for unknown or missing keys, bad head settings, a model without a head, missing data files."""
    for names, allowed in ((recipe, known), (recipe.get("model_kwargs", {}), set(HEAD_KEYS))):
        for key in names:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, 1)
                hint = f"did you mean '{near[0]}'?" if near else "see `swift sft --help`"
                raise InputError(f"{where}: unknown key '{key}'; {hint}")
    for key in NEEDED:
        if not recipe.get(key):
            raise InputError(f"{where}: the key '{key}' is missing; see configs/quickstart.yaml")
    head = recipe["model_kwargs"]
    steps, attention, limit = (
        head.get("mtp_num_steps"),
        head.get("mtp_attention"),
        head.get("mtp_eval_limit", 1),
    )
    for name, value in (("mtp_num_steps", steps), ("mtp_eval_limit", limit)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{where}: {name} must be a whole number of at least 1, not {value}")
    if not isinstance(head.get("mtp_compile", False), bool):
        raise InputError(f"{where}: mtp_compile must be true or false, not {head['mtp_compile']}")
    if attention not in ATTENTIONS:
        raise InputError(f"{where}: mtp_attention must be one of {', '.join(ATTENTIONS)}, not {attention}")
    try:
        _ = MiMoConfig(**{name: value for name, value in head.items() if name in SETTINGS}).objective
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if "mtp_eval_data" in head:
        if recipe.get("val_dataset"):
            raise InputError(
                f"{where}: mtp_eval_data picks the best checkpoint by tau, val_dataset by loss; leave one out"
            )
        files.existing(head["mtp_eval_data"], f"file ('mtp_eval_data' in {where})")
    read_head(recipe["model"])
    for key in ("dataset", "val_dataset"):
        names = recipe.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            if Path(name).suffix in (".jsonl", ".json", ".csv"):
                files.existing(name, f"file ('{key}' in {where})")


def train(recipe: dict) -> None:
    """Run `swift sft` on a checked recipe; its resolved form is kept in output_dir. SystemExit(1) if it
    fails.
    """
    needs = {"mtp_tau": "mtp_eval_data" in recipe["model_kwargs"], "mtp_gather": recipe.get("fsdp")}
    added = [name for name, needed in needs.items() if needed]
    if added:
        recipe = {**recipe, "callbacks": [*recipe.get("callbacks", []), *added]}
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "recipe.yaml"  # ms-swift copies it to output_dir
        resolved.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
        start = "from swift.cli.main import cli_main; cli_main()"
        environment = {**os.environ, "PYTHONPATH": files.python_path()}  # the plugin imports the package
        command = [sys.executable, "-c", start, "sft", str(resolved)]
        code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        print(
            f"fastmtp.train: `swift sft` ended with code {code}; its own messages are above", file=sys.stderr
        )
        raise SystemExit(1)
    dataset = recipe["dataset"]
    files.write_provenance(recipe["output_dir"], recipe, [dataset] if isinstance(dataset, str) else dataset)


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.train",
        "Fine-tune the head on a recipe through `swift sft`. Further flags override the recipe's keys.",
        "python -m fastmtp.train configs/mimo7b_k3.yaml --learning_rate 1e-4 --mtp_num_steps 5",
    )
    p.add_argument(
        "recipe", nargs="?", default="configs/mimo7b_k3.yaml", help="YAML (default configs/mimo7b_k3.yaml)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    # not parse_known_args: it takes the value of the first override for a recipe that was left out
    count = 1 if words and not words[0].startswith("--") else 0
    args = parser().parse_args(["--help"] if "--help" in words else words[:count])
    recipe = apply_overrides(read_mapping(args.recipe, "recipe"), words[count:])
    logging.disable(logging.INFO)  # ms-swift logs a line when it is imported
    try:
        from fastmtp.swift_plugin import swift_keys
    except ImportError as error:
        raise InputError(
            f"ms-swift cannot be imported ({error}); run: pip install 'fastmtp[train]'"
        ) from None
    logging.disable(logging.NOTSET)
    check(recipe, swift_keys(), args.recipe)
    train(recipe)


if __name__ == "__main__":
    run(main)
