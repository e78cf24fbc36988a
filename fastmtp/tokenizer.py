"""One loader for tokenizers, one definition of the ids that end an answer, one fingerprint of what ids mean."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer

from fastmtp import files
from fastmtp.cli import InputError


def load_tokenizer(name: str):
    """The tokenizer of a model folder or a Hub name; InputError where there is none or it is not a fast one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name}: no tokenizer ({reason}); pass a model folder or a Hub name as --tokenizer"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(
            f"{name}: only fast tokenizers (with tokenizer.json) are supported; convert it first"
        )
    return tokenizer


def fingerprint(tokenizer, first: int | None = None) -> str:
    """SHA-256 of the tokenizer's (id, token) pairs, or of the `first` lowest ids': what a map's ids mean."""
    pairs = sorted((i, token) for token, i in tokenizer.get_vocab().items())[:first]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def end_ids(folder: str, tokenizer) -> set[int]:
    """The ids that end an answer, from a model folder and its tokenizer."""
    ends = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        if (Path(folder) / name).exists():
            found = files.read_json(Path(folder) / name).get("eos_token_id")
            ends |= set(found if isinstance(found, list) else [found])
    return ends - {None}
