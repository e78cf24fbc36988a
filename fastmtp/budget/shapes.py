"""Models' shapes, and the bytes that a decoding cycle must read, from a shape alone.

At one stream a pass reads every weight once and computes next to nothing, so bytes over bandwidth bound its
time.
"""

from __future__ import annotations

from pathlib import Path

from fastmtp import hub
from fastmtp.cli import InputError
from fastmtp.inputs import read_json

BYTES = 2  # per weight, bfloat16


def _shape(sizes: str, vocab: int, positions: int, theta: float, tied: bool, eps: float = 1e-6) -> dict:
    """`sizes`: hidden, intermediate, layers, query heads, key and value heads, head width."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim")
    shape = dict(zip(names, map(int, sizes.split()), strict=True))
    shape |= {"vocab_size": vocab, "max_position_embeddings": positions, "rms_norm_eps": eps}
    return shape | {"rope_theta": theta, "tie_word_embeddings": tied}


# as in the config.json of MiMo-7B-RL, SmolLM2-135M and Qwen2.5
SHAPES = {
    "mimo-7b": _shape("4096 11008 36 32 8 128", 151680, 32768, 640000.0, False, 1e-5),
    "smollm2": _shape("576 1536 30 9 3 64", 49152, 8192, 100000.0, True, 1e-5),
    "qwen2.5-0.5b": _shape("896 4864 24 14 2 64", 151936, 32768, 1000000.0, True),
    "qwen2.5-1.5b": _shape("1536 8960 28 12 2 128", 151936, 32768, 1000000.0, True),
    "qwen2.5-32b": _shape("5120 27648 64 40 8 128", 152064, 32768, 1000000.0, False),
}
SIZES = {"0.5B": "qwen2.5-0.5b", "1.5B": "qwen2.5-1.5b", "7B": "mimo-7b", "30B": "qwen2.5-32b"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of mixtures of experts


def shape_of(model: str) -> dict:
    """The shape of a size or name above, of a model folder, a config.json, or a hub's model (its weights are
    not downloaded).

    Raises InputError if it is none of them, or if its config.json does not describe a dense decoder.
    """
    names = {name.lower(): shape for name, shape in (SIZES | {name: name for name in SHAPES}).items()}
    if model.lower() in names:
        return SHAPES[names[model.lower()]]
    folder = hub.configuration(model) or Path(model)
    path = folder / "config.json" if folder.is_dir() else folder
    if not path.is_file():
        known = ", ".join([*SIZES, *SHAPES])
        raise InputError(f"{model}: no model folder, no config.json and none of {known}")
    config = read_json(path)
    if any(config.get(key) for key in EXPERTS):
        raise InputError(f"{path}: a mixture of experts; the estimate is for dense models only")
    shape = {}
    for key in SHAPES["mimo-7b"]:
        shape[key] = config.get(key)
    heads, hidden = shape["num_attention_heads"], shape["hidden_size"]
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:  # what configs may leave out
        shape["head_dim"] = head_dim(shape)
        shape["num_key_value_heads"] = shape["num_key_value_heads"] or heads
    for key in list(shape)[:7]:  # the sizes, which everything is counted from
        if type(shape[key]) is not int or shape[key] < 1:
            raise InputError(f"{path}: {key} must be a whole number of at least 1, not {shape[key]!r}")
    return shape


def layer_bytes(shape: dict) -> int:
    """One Qwen2 decoder layer: q, k, v with biases, o, the MLP, two norms."""
    h, f = shape["hidden_size"], shape["intermediate_size"]
    q, kv = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    attention = h * (q + 2 * kv) + (q + 2 * kv) + q * h
    return BYTES * (attention + 3 * h * f + 2 * h)


def rows_bytes(shape: dict, rows: int) -> int:
    """`rows` rows of the output matrix, or of the embedding."""
    return BYTES * rows * shape["hidden_size"]


def backbone_bytes(shape: dict) -> int:
    """One verify or plain decoding pass: all layers, the final norm, the output matrix. Of the embedding only
    rows.
    """
    norm = BYTES * shape["hidden_size"]
    return shape["num_hidden_layers"] * layer_bytes(shape) + norm + rows_bytes(shape, shape["vocab_size"])


def model_bytes(shape: dict) -> int:
    """All weights of the backbone, the embedding included."""
    return backbone_bytes(shape) + (
        0 if shape["tie_word_embeddings"] else rows_bytes(shape, shape["vocab_size"])
    )


def head_bytes(shape: dict) -> int:
    """The MTP layer with its input projection and three norms."""
    h = shape["hidden_size"]
    return layer_bytes(shape) + BYTES * (2 * h * h + 3 * h)


def draft_bytes(shape: dict, head_rows: int) -> int:
    """One draft step: the MTP layer and `head_rows` rows of the output matrix."""
    return head_bytes(shape) + rows_bytes(shape, head_rows)


def context_bytes(shape: dict) -> int:
    """Keys and values of one token in one layer."""
    return BYTES * cache_numbers(shape)


def cache_numbers(config: dict) -> int:
    """Numbers in the keys and values of one token in one layer."""
    return 2 * config["num_key_value_heads"] * head_dim(config)


def head_dim(config: dict) -> int:
    """Width of an attention head; a config.json may leave it to be derived."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def cycle_bytes(shape: dict, num_steps: int, head_rows: int, context: int) -> int:
    """Backbone once, draft `num_steps` times (the first is the draft-extend pass), keys and values of
    `context` tokens.
    """
    weights = backbone_bytes(shape) + num_steps * draft_bytes(shape, head_rows)
    return weights + context_bytes(shape) * context * (shape["num_hidden_layers"] + num_steps)
