"""Shapes to serve with dummy weights, and the accept lengths to assume."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastmtp.budget import shapes as budget
from fastmtp.cli import InputError
from fastmtp.inputs import read_jsonl

# Small enough to try a command itself in a minute; its speeds mean nothing.
TINY = {
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
}
SHAPES = budget.SHAPES | {"tiny": TINY}


def shape_of(name: str) -> dict:
    """The shape of a name in SHAPES, or of a model folder. Raises InputError."""
    return SHAPES[name] if name in SHAPES else budget.shape_of(name)


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
        if not name.startswith("fastmtp:") or "@" in name:  # a tree accepts more
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
