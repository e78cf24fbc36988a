"""One loader for tokenizers, one comparison of two, one definition of the ids that end an answer, one
fingerprint of what ids mean.

transformers 5 does not always follow a folder's tokenizer.json: for some model types, and for some classes
named in tokenizer_config.json, it rebuilds the pre-tokenizer in code. Therefore every folder that we write is
read back as engines read it, and compared on `PROBES`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from fastmtp.cli import InputError
from fastmtp.formats.gguf_file import byte_level
from fastmtp.inputs import read_json

FILE = "tokenizer.json"
FILES = (  # all that a tokenizer consists of
    *(FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
TEMPLATES = "additional_chat_templates"  # a folder: templates that are used for tools alone, say
PROBES = (  # what pre-tokenizers and normalizers treat differently
    "in 2023 and 123, 3.14159, 1000000, ١٢٣ and 17+25=42",
    "a\n\n  b\n\n\n\tc\t\td  \r\n    return x ** 2  # e   ",
    " one leading space,  two  inside, one at the end ",
    "it's, we're, I'LL, don't, 'tis, O'Neil, HTTPServer snake_case [UNK] <unk> </s>",
    "猫坐在垫子上。今天天气很好！ 日本語の文、한국어 문장",
    "Привет, café, cafe\u0301, naïve, Ελλάδα, مرحبا, हिन्दी, ﬁ, Å",
    "😀👩‍👩‍👧 ½ ① \u00a0\u3000\u200b…",
    "```python\nfor i in range(10):\n        print(f'{i}!')\n```",
)


def load_tokenizer(name: str | Path):
    """The tokenizer of a model folder, a .gguf file or a Hub name, as engines read it (no remote code).

    Raises InputError if there is none or if it is not a fast one.
    """
    from transformers import AutoTokenizer  # takes seconds, which --help and a wrong flag need not wait for

    path = Path(name)
    try:
        if path.suffix == ".gguf":
            tokenizer = byte_level(path) or AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # a torn tokenizer.json raises a bare Exception
        raise InputError(
            f"{name}: no tokenizer ({_reason(error)}); give a model folder or a Hub name that has one"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{name}: only fast tokenizers (with tokenizer.json) are supported; convert it first"
        )
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        # Without its files transformers builds an empty tokenizer of the model's type.
        raise InputError(f"{name}: the tokenizer has no vocabulary; copy its files again")
    return tokenizer


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def own_tokenizer(source: str | Path) -> tuple[object, str | None]:
    """(the tokenizer of `source`, a warning or None).

    As a rule it is what transformers and the engines read. If that loses text that tokenizer.json keeps
    (because tokenizer_config.json names a class of another kind), it is tokenizer.json itself.
    """
    tokenizer = load_tokenizer(source)
    if not (Path(source) / FILE).is_file():
        return tokenizer, None
    file = from_file(source)
    text = different_text(file, tokenizer)
    if text is None:
        return tokenizer, None
    name = type(tokenizer).__name__
    if loses_text(tokenizer) and not loses_text(file):
        return file, f"{source}: transformers builds a {name} that loses text; the ids of {FILE} are used"
    return tokenizer, (
        f"{source}: transformers and the engines build a {name} that reads other ids than {FILE} has, "
        f"for example for {text!r}; the new folder keeps the ids that they read"
    )


def save_tokenizer(tokenizer, source: str | Path, folder: Path) -> None:
    """Put the tokenizer of `source` into `folder`; byte for byte if its files alone make it."""
    source = Path(source)
    settings = source / "tokenizer_config.json"
    settings = read_json(settings) if settings.is_file() else {}
    as_published = (
        (source / FILE).is_file()
        and "auto_map" not in settings
        and "tokenizer_class" in settings
        and different(tokenizer, load_tokenizer(source)) is None
    )
    if not as_published:
        tokenizer.save_pretrained(folder)
        return
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    copy_templates(source, folder)


def copy_templates(source: Path, folder: Path) -> None:
    """Copy the chat templates beside the main one; a no-op if there are none."""
    for path in sorted((source / TEMPLATES).glob("*.jinja")):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / TEMPLATES / path.name)


def check_fits(folder: str | Path, tokenizer, vocab_size: int) -> None:
    """InputError for a tokenizer with ids that the model has no embedding of."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has the id {largest}, the model only {vocab_size} rows; "
            "copy tokenizer and weights of one model"
        )


def from_file(folder: str | Path):
    """The tokenizer exactly as tokenizer.json in `folder` describes it. Raises InputError."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise InputError(
            f"{folder}: tokenizer.json cannot be read ({_reason(error)}); copy it again"
        ) from None


def _texts(tokenizer) -> list[str]:
    """The probes, and one text that holds every added token."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return [*PROBES, "".join(f"{token} x\n{token}" for token in added)]


def different_text(one, other) -> str | None:
    """The first probe that two tokenizers read or spell differently, shortened; None if there is none."""
    for text in _texts(one):
        for special in (False, True):
            ids = one(text, add_special_tokens=special)["input_ids"]
            if ids != other(text, add_special_tokens=special)["input_ids"]:
                return text[:60]
        if one.decode(ids) != other.decode(ids):
            return text[:60]
    return None


def different(one, other) -> str | None:
    """The first probe or token in which two tokenizers differ; None if they read, spell and know the same."""
    text = different_text(one, other)
    first, second = one.get_vocab(), other.get_vocab()
    return min(token for token, _ in first.items() ^ second.items()) if not text and first != second else text


def loses_text(tokenizer) -> bool:
    """Whether a plain text does not survive reading and writing."""
    text = "the cat, and 12 hats"
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() != text


def template_fault(tokenizer) -> str | None:
    """Why the chat template renders not even a plain question; None if it does."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except Exception as error:  # templates raise what they like
        return _reason(error)
    return None


def takes_system_turn(tokenizer) -> bool:
    """Whether the chat template renders a system turn. A template that refuses it, or drops it, does not."""
    turns = [{"role": "system", "content": "kept-system"}, {"role": "user", "content": "kept-user"}]
    try:
        return "kept-system" in tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # templates raise what they like
        return False


def check_same(folder: str | Path, tokenizer) -> None:
    """InputError if engines read other ids from `folder` than `tokenizer` gives."""
    text = different(tokenizer, load_tokenizer(folder))
    if text is not None:
        raise InputError(
            f"{folder}: transformers would read other ids from the new folder than from the source, "
            f"for example for {text!r}; nothing was written"
        )


def fingerprint(tokenizer, first: int | None = None) -> str:
    """SHA-256 of the tokenizer's (id, token) pairs, or of the `first` lowest ids': what a map's ids mean."""
    pairs = sorted((i, token) for token, i in tokenizer.get_vocab().items())[:first]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def end_ids(folder: str | Path, tokenizer) -> set[int]:
    """The ids that end an answer, from a model folder and its tokenizer."""
    ends = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        if (Path(folder) / name).exists():
            value = read_json(Path(folder) / name).get("eos_token_id")
            ends |= set(value if isinstance(value, list) else [value])
    return ends - {None}
