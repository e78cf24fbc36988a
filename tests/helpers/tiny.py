"""What the tests of the core share: random MiMo models small enough to check by hand, a ChatML tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastmtp.checkpoint import finish_folder
from fastmtp.head.losses import IGNORE
from fastmtp.head.modeling_mimo import MiMoConfig, MiMoForCausalLM
from fastmtp.reference.model import Model
from fastmtp.reference.speculative import generate

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "what is two plus two? two plus two is four, and four plus four is eight.",
    "system user assistant You are a helpful assistant.\n",
]


SHAPE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.3, **changes
) -> MiMoForCausalLM:
    """A random model, every tensor of it random, norms and biases too, so that no term of the arithmetic is
    silent.
    """
    settings = SHAPE | dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
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


def save_released(folder: Path, shards: str = "50GB") -> Path:
    """A tiny folder as MiMo-7B was released: its key set, model_type mimo, remote code of its own."""
    save_folder(folder, shards=shards)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mimo",
        "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
        "rope_theta": 640000,
    }
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("modeling_mimo.py", "recursion.py", "losses.py", "teacher.py"):
        (folder / name).unlink()
    (folder / "configuration_mimo.py").write_text("raise RuntimeError('remote code was run')\n")
    return folder


def save_llama(folder: Path) -> Path:
    """A tiny Llama checkpoint as others publish it."""
    shape = dict(
        vocab_size=len(chatml_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2
    )
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    chatml_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Useful:
    """A tiny model whose head is worth using, prompts, and its own greedy answers to them."""

    model: Model
    prompts: list[list[int]]
    answers: list[list[int]]
    token_map: torch.Tensor


def useful_model(**changes) -> Useful:
    """Train a head for a moment on its model's greedy answers; tau comes out near 2."""
    net = tiny_model(7, spread=0.2, vocab_size=32, mtp_num_steps=3, **changes)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 32, (3 + n % 4,), generator=generator).tolist() for n in range(12)]
    answers = [generate(wrap(net), prompt, 40, 0).ids for prompt in prompts]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = torch.tensor(prompt + answer)
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
        labels[row, len(prompt) : len(text)] = text[len(prompt) :]
    head = net.head.requires_grad_(True)
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        net(input_ids=ids, labels=labels, attention_mask=mask).loss.backward()
        optimiser.step()
    head.requires_grad_(False)
    common = (
        torch.tensor([t for answer in answers for t in answer])
        .bincount(minlength=32)
        .topk(10)
        .indices.sort()
        .values
    )
    return Useful(wrap(net), prompts, answers, common)


def samples_of(useful: Useful, count: int = 30) -> list[dict]:
    """The model's greedy answers, of several lengths, one of a single token."""
    lengths = [count, 7, 2, 1, count - 1, 12]
    return [
        dict(id=str(n), source=f"s{n % 2}", lang="en", prompt_ids=prompt, output_ids=answer[: lengths[n % 6]])
        for n, (prompt, answer) in enumerate(zip(useful.prompts, useful.answers, strict=True))
    ]
