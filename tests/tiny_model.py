"""A tokenizer with a chat template and a random model, both made on the spot, for tests without any download."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """Words by hash-free lookup: 60 words, roles, unknown, end; spaces split."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    words += [f"w{n}" for n in range(6, 60)] + ["red", "green", "blue", "what", "is"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)


def save_mimo(folder: Path) -> None:
    """A two-layer MiMo with random weights, spread wide so that its greedy choices are clear; its drafts are noise."""
    import torch

    from fastmtp.modeling_mimo import MiMoConfig, MiMoForCausalLM

    torch.manual_seed(0)
    config = MiMoConfig(
        vocab_size=65,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        tie_word_embeddings=False,
        eos_token_id=2,
        pad_token_id=1,
    )
    MiMoForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
