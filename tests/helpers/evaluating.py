"""What tests of the evaluation share: its arguments, its lines, and a decoder that makes its tokens up."""

import json
import types
from dataclasses import dataclass, field

from fastmtp.reference import model as model_module
from fastmtp.reference import speculative
from fastmtp.tokenizer import load_tokenizer


def arguments(model, questions, out, *more):
    return [
        "--model",
        model,
        "--question-folder",
        questions,
        "--out",
        str(out),
        "--max-gen-length",
        "30",
        *more,
    ]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class Generation:
    ids: list
    verify_passes: int
    histogram: list
    prefill_s: float = 0.001
    decode_s: float = 0.001
    calls: list = field(default_factory=list)


def fake_decoder(monkeypatch, lossless=True):
    """The interface of fastmtp.decoding over made-up tokens; `lossless=False` changes one token when
    drafting.
    """
    calls = []

    def generate(
        model, prompt_ids, max_new_tokens, drafts, temperature=0.0, seed=0, token_map=None, eos_ids=None
    ):
        calls.append((model.loaded, drafts, token_map))
        ids = [6 + (sum(prompt_ids) + n) % 40 for n in range(min(12, max_new_tokens))]
        if drafts and not lossless:
            ids[7] += 1
        passes = 4 if drafts else 0
        histogram = [sum(n % (drafts + 1) == j for n in range(passes)) for j in range(drafts + 1)]
        return Generation(ids, passes, histogram)

    monkeypatch.setattr(
        model_module,
        "load",
        lambda folder, dtype="float32", device="cpu": types.SimpleNamespace(
            tokenizer=load_tokenizer(folder),
            eos_ids={2},
            loaded=(folder, dtype, device),
            net=types.SimpleNamespace(vocab_size=65),
        ),
    )
    monkeypatch.setattr(speculative, "generate", generate)
    return calls
