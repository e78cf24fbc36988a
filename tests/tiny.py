"""What the tests of the core share: random MiMo models small enough to check by hand, and a ChatML tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastmtp.decoding import Model
from fastmtp.export import finish_folder
from fastmtp.modeling_mimo import MiMoConfig, MiMoForCausalLM

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "what is two plus two? two plus two is four, and four plus four is eight.",
    "system user assistant You are a helpful assistant.\n",
]


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.3, **changes) -> MiMoForCausalLM:
    """A random model, every tensor of it random, norms and biases too, so that no term of the arithmetic is silent."""
    settings = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    net = MiMoForCausalLM(MiMoConfig(**settings | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(1 + noise if "norm" in name else noise)
    return net.to(dtype).eval().requires_grad_(False)


def wrap(net: MiMoForCausalLM, eos_ids: set[int] = frozenset()) -> Model:
    return Model(net, None, set(eos_ids))


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens with a ChatML template; no text is unknown to it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def save_folder(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shards: str = "50GB", **changes
) -> Path:
    """A tiny model and its tokenizer as a folder in MiMo layout."""
    tokenizer = chatml_tokenizer()
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    net = tiny_model(seed, dtype, spread=0.1, vocab_size=len(tokenizer), **ends | changes)
    net.save_pretrained(folder, max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    finish_folder(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return folder
