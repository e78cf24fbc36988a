"""Models' shapes; the bytes that a decoding cycle must read, from a shape alone; the accept lengths to
assume.

At one stream a pass reads every weight once and computes next to nothing, so bytes over bandwidth bound its
time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastmtp.cli import InputError
from fastmtp.inputs import read_jsonl

BYTES = 2  # bfloat16

SHAPES = {
    "mimo-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151680,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 640000.0,
        "tie_word_embeddings": False,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    # Small enough to try the command itself in a minute; its speeds mean nothing.
    "tiny": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 65536,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}


def config_json(shape: dict) -> dict:
    """A config.json that SGLang serves with dummy weights, draft included."""
    fixed = {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_sliding_window": False,
    }
    return shape | fixed


def layer_bytes(shape: dict) -> int:
    """One Qwen2 decoder layer: q, k, v with biases, o, the MLP, two norms."""
    h, f = shape["hidden_size"], shape["intermediate_size"]
    q, kv = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    attention = h * (q + 2 * kv) + (q + 2 * kv) + q * h
    return BYTES * (attention + 3 * h * f + 2 * h)


def backbone_bytes(shape: dict) -> int:
    """One verify or plain decoding pass: all layers, the final norm, the output head. Of the embedding only
    rows.
    """
    h = shape["hidden_size"]
    return shape["num_hidden_layers"] * layer_bytes(shape) + BYTES * (h + shape["vocab_size"] * h)


def draft_bytes(shape: dict, head_rows: int) -> int:
    """One draft step: the MTP layer with its input projection and three norms, and `head_rows` rows of the
    head.
    """
    h = shape["hidden_size"]
    return layer_bytes(shape) + BYTES * (2 * h * h + 3 * h + head_rows * h)


def cycle_bytes(shape: dict, num_steps: int, head_rows: int, context: int) -> int:
    """Backbone once, draft `num_steps` times (the first is the draft-extend pass), keys and values of
    `context` tokens.
    """
    kv = BYTES * 2 * shape["num_key_value_heads"] * shape["head_dim"] * context
    weights = backbone_bytes(shape) + num_steps * draft_bytes(shape, head_rows)
    return weights + kv * (shape["num_hidden_layers"] + num_steps)


@dataclass(frozen=True)
class Rates:
    """rates[i]: share of passes that accept draft i+1; for the full head, for maps by name, and for all other
    maps.
    """

    full: list[float]
    mapped: list[float]
    by_map: dict[str, list[float]]
    source: str

    def tau(self, num_steps: int, map_name: str | None) -> float:
        """Accept length, the backbone's own token included. Raises InputError if the rates are too short."""
        rates = self.full if map_name is None else self.by_map.get(map_name, self.mapped)
        if num_steps > len(rates):
            raise InputError(
                f"{self.source}: rates of {len(rates)} positions cannot give K = {num_steps}; use fewer steps"
            )
        return 1 + sum(rates[:num_steps])


# Table 1 of arXiv 2509.18362 gives accept lengths 1.81, 2.37, 2.73 (1.79, 2.33, 2.66 with a 32k map) for
# K = 1, 2, 3; positions 4 to 7 are read off its curve over K and are rougher.
PAPER = Rates(
    [0.81, 0.56, 0.36, 0.22, 0.13, 0.08, 0.05],
    [0.79, 0.54, 0.33, 0.20, 0.12, 0.07, 0.05],
    {"32k": [0.79, 0.54, 0.33, 0.20, 0.12, 0.07, 0.05]},
    "the paper",
)


def read_rates(source: str) -> Rates:
    """`paper`, or a results.jsonl of evaluation.run: its longest fastmtp arms, tasks pooled by verify
    passes.
    """
    if source == "paper":
        return PAPER
    by_map: dict[str | None, tuple[int, list[tuple[float, list[float]]]]] = {}
    for number, row in read_jsonl(source):
        try:
            name, steps = row["arm"], row["num_steps"]
            passes = row["output_tokens"] / row["accept_length"] if row["accept_length"] else 0
            rates = row["position_rates"]
        except KeyError as error:
            raise InputError(
                f"{source}:{number}: no field {error}; give the results.jsonl of evaluation.run"
            ) from None
        if not name.startswith("fastmtp:"):
            continue
        map_name = name.partition("+")[2] or None
        longest = by_map.get(map_name, (0, []))
        if steps > longest[0]:
            longest = (steps, [])
        if steps == longest[0]:
            longest[1].append((passes, rates))
        by_map[map_name] = longest
    if None not in by_map:
        raise InputError(f"{source}: no fastmtp:K arm with the full head; run evaluation.run with one")
    pooled = {name: _pooled(rows) for name, (_, rows) in by_map.items()}
    full = pooled.pop(None)
    return Rates(full, full, pooled, Path(source).name)


def _pooled(rows: list[tuple[float, list[float]]]) -> list[float]:
    total = sum(passes for passes, _ in rows)
    return [sum(passes * rates[i] for passes, rates in rows) / total for i in range(len(rows[0][1]))]


def write_folder(shape: dict, folder: Path) -> None:
    """The model folder for `--load-format dummy`: nothing but a config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(shape), indent=2) + "\n", encoding="utf-8")
