"""The Qwen2 tokenizer (MiMo-7B's as well) as a folder, without the Hub: from the merge ranks in PyPI's
`dashscope`.

The ranks (`resources/qwen.tiktoken`) give vocabulary and merges; the pre-tokenizer is the one of
transformers' own Qwen2 class; the added tokens are Qwen2.5's 22. `--check FILE` encodes a text file's lines
by two independent
implementations, tokenizers and tiktoken, and decodes them again: any difference ends with exit code 1.

    pip install dashscope tiktoken
    python -m benchmarks.qwen2_tokenizer --out models/qwen2 --check README.md
"""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fastmtp import files
from fastmtp.cli import InputError, Parser, run
from fastmtp.inputs import existing

# In the order of their ids, from 151643 on.
ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
    "<|file_sep|>"
).split()
SPECIAL = 14  # the first so many are special; the others are ordinary text to `skip_special_tokens`
RANKS = 151643


def find_ranks() -> Path:
    """The ranks file inside dashscope; looked up, not imported, because importing it needs more packages."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None:
        raise InputError("dashscope is not installed; pip install dashscope, or pass --ranks qwen.tiktoken")
    return existing(Path(spec.origin).parent / "resources" / "qwen.tiktoken")


def build(ranks: Path):
    """A transformers Qwen2 tokenizer from a .tiktoken file; InputError if it does not hold Qwen2's 151,643
    ranks.
    """
    from transformers import AddedToken, Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    try:
        vocab, merges = TikTokenConverter(str(ranks)).extract_vocab_merges_from_model(str(ranks))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{ranks}: not a .tiktoken file ({error})") from None
    if sorted(vocab.values()) != list(range(RANKS)):
        raise InputError(
            f"{ranks}: {len(vocab)} ranks instead of Qwen2's {RANKS}; take dashscope's qwen.tiktoken"
        )
    # The class gives ids to added tokens in its own order, unless the vocabulary has them already.
    vocab |= {token: RANKS + i for i, token in enumerate(ADDED)}
    tokenizer = Qwen2Tokenizer(
        vocab, merges, unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=i < SPECIAL) for i, token in enumerate(ADDED)]
    )
    return tokenizer


def check(tokenizer, ranks: Path, path: Path) -> tuple[int, int]:
    """(lines, tokens) of a text file on which tokenizers and tiktoken agree and decoding gives the text
    back.
    """
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    other = tiktoken.Encoding(
        "qwen2", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=load_tiktoken_bpe(str(ranks)), special_tokens={}
    )
    total = 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        text = unicodedata.normalize("NFC", line)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != other.encode(text, disallowed_special=()) or tokenizer.decode(ids) != text:
            raise RuntimeError(
                f"{path}:{number}: the two implementations differ, or decoding does not give the text back"
            )
        total += len(ids)
    return len(lines), total


def main(argv: Sequence[str] | None = None) -> None:
    p = Parser(
        "python -m benchmarks.qwen2_tokenizer",
        "Write the Qwen2 tokenizer as a folder that transformers loads, from dashscope's merge ranks.",
        "python -m benchmarks.qwen2_tokenizer --out models/qwen2 --check README.md",
    )
    p.add_argument("--out", required=True, help="folder for tokenizer.json and tokenizer_config.json")
    p.add_argument("--ranks", help="a qwen.tiktoken file (default: the one in the installed dashscope)")
    p.add_argument("--check", help="UTF-8 text to encode with tokenizers and tiktoken, which must agree")
    args = p.parse_args(argv)
    ranks = existing(args.ranks) if args.ranks else find_ranks()
    tokenizer = build(ranks)
    with files.atomic(args.out) as temporary:
        tokenizer.save_pretrained(temporary)
        files.write_provenance(temporary, vars(args), [ranks])
    print(f"{args.out}: {len(tokenizer)} tokens, {ADDED[0]} is {tokenizer.convert_tokens_to_ids(ADDED[0])}")
    if args.check:
        lines, tokens = check(tokenizer, ranks, existing(args.check))
        print(f"{args.check}: {lines} lines, {tokens} tokens, the same with tiktoken")


if __name__ == "__main__":
    run(main)
