"""The tokenizer of a GGUF file with a byte-level vocabulary, built from the file's own fields.

A GGUF file holds tokens and merges, but of the pre-tokenizer only a name. Which names transformers knows, and
what it makes of them, changes with its version; here a name is known or refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from fastmtp.cli import InputError

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3")  # a word that is a token is never built by merges
QWEN2 = ("qwen2", "deepseek-r1-qwen", "megrez")
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's kinds of tokens that text never makes by merging
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Within the block each GGUF file is parsed once. transformers opens it anew for the configuration, the
    tokenizer and the weights, and names its tensors anew for every module, which costs seconds each time.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(gguf, name) for name in names}
    for name, function in before.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


def byte_level(path: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a GGUF file; None if its vocabulary is of another kind (sentencepiece).

    Raises InputError for a pre-tokenizer that is not known here.
    """
    from gguf import GGUFReader

    fields = GGUFReader(str(path)).fields  # text, as transformers gives it

    def field(name: str) -> object:
        return fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else None

    if field("ggml.model") != "gpt2":
        return None
    tokens, kinds, pre = field("ggml.tokens"), field("ggml.token_type") or [], field("ggml.pre")
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in field("ggml.merges")],
            ignore_merges=pre in LLAMA3,
        )
    )
    backend.pre_tokenizer = _pre_tokenizer(pre, path)
    if pre in QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        add([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=False) if k == kind])
    names = {f"{short}_token": field(f"ggml.{long}_token_id") for short, long in SPECIAL.items()}
    special = {name: tokens[number] for name, number in names.items() if number is not None}
    if field("ggml.add_bos_token"):
        first = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, names["bos_token"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=field("chat_template"), **special)


def _pre_tokenizer(name: object, path: Path) -> pre_tokenizers.PreTokenizer:
    """What cuts a text into words before merging, by llama.cpp's name for it."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":  # digits one by one, then GPT-2's rule
        first = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in (*LLAMA3, "smaug-bpe", *QWEN2):
        digits = r"\p{N}" if name in QWEN2 else r"\p{N}{1,3}"
        words = pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", digits)), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, byte_level])
    raise InputError(
        f"{path}: its pre-tokenizer '{name}' is not known here, so ids could be wrong; "
        "give the original Hugging Face folder instead of the .gguf file"
    )
