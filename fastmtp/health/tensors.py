"""Weights: names, shapes, dtypes, values, the output matrix, biases, and what the head is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmtp.checkpoint import ENGINE_TYPES, PREFIX, check_weights, some
from fastmtp.formats.weights import DTYPES, read_tensors
from fastmtp.health.folder import ERROR, OK, WARNING, Folder, Line

MATRICES = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)
EDGE = 1.15  # a random matrix's largest singular value is its theoretical edge; a trained one's is far beyond


def architecture(folder: Folder) -> Iterator[Line]:
    config = folder.config
    name = f"{(config.get('architectures') or ['none'])[0]} ({config.get('model_type')})"
    if folder.is_mimo:
        count = config.get("num_nextn_predict_layers")
        if count != 1:
            yield Line("architecture", ERROR, f"{name}: num_nextn_predict_layers is {count}", "set it to 1")
        else:
            yield Line("architecture", OK, name)
    elif config.get("model_type") in ENGINE_TYPES:
        yield Line("architecture", ERROR, f"{name}: a plain model", "run fastmtp.prepare_model on it")
    else:
        yield Line("architecture", ERROR, f"{name}: not MiMo layout", "FastMTP takes Llama, Qwen2 and MiMo")


def quantisation(folder: Folder) -> Iterator[Line]:
    odd = {e.dtype for e in folder.entries.values()} - set(DTYPES)
    method = folder.config.get("quantization_config") or folder.config.get("compression_config")
    if method:
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        yield Line("quantisation", ERROR, f"config.json says {name}", "give the unquantised model")
    elif odd:
        yield Line(
            "quantisation", ERROR, f"tensors of {', '.join(sorted(odd))}", "give the unquantised model"
        )
    else:
        yield Line("quantisation", OK, "none")


def tensors(folder: Folder) -> Iterator[Line]:
    """Names, shapes and dtypes from the headers; then every value."""
    if folder.is_mimo or folder.config.get("model_type") in ENGINE_TYPES:
        check_weights(folder.path)
    kinds = sorted({entry.dtype for entry in folder.entries.values()})
    level = WARNING if len(kinds) > 1 else OK
    yield Line("tensors", level, f"{len(folder.entries)} in {' and '.join(kinds)}")
    broken = [
        name
        for name, tensor in read_tensors(folder.entries)
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()
    ]
    if broken:
        cure = "copy the file again or train again"
        yield Line("values", ERROR, f"NaN or infinity in {some(broken)}", cure)
    else:
        yield Line("values", OK, "all finite")


def output_matrix(folder: Folder) -> Iterator[Line]:
    tied = bool(folder.config.get("tie_word_embeddings"))
    rows, embedding = folder.tensor("lm_head.weight"), folder.tensor("model.embed_tokens.weight")
    if rows is None or embedding is None:
        level = OK if tied and embedding is not None else ERROR
        yield Line("output matrix", level, "tied" if tied else "missing, and config.json does not tie it")
    elif tied and not torch.equal(rows, embedding):
        text = (
            "config.json says tied, but lm_head differs from the embedding, which engines would use instead"
        )
        yield Line("output matrix", ERROR, text, "set tie_word_embeddings to false")
    else:
        yield Line("output matrix", OK, "tied" if tied else "untied")


def biases(folder: Folder) -> Iterator[Line]:
    names = [n for n in folder.entries if n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    plain = [name for name in names if ".mtp" not in name]
    if not names:
        level = ERROR if folder.is_mimo else OK
        yield Line("q/k/v biases", level, "none", "run fastmtp.prepare_model" if folder.is_mimo else "")
        return
    ignored = folder.config.get("model_type") == "llama" and not folder.config.get("attention_bias")
    if ignored and any(tensor.any() for _, tensor in read_tensors({n: folder.entries[n] for n in plain})):
        text = "not zero, but a plain Llama without attention_bias leaves them out"
        yield Line("q/k/v biases", ERROR, text, "set attention_bias to true in config.json")
    else:
        yield Line("q/k/v biases", OK, f"{len(names)}")


def is_random(matrix: Tensor) -> bool:
    """Whether a matrix [M, N] has no structure: its largest singular value is that of independent numbers."""
    spread = matrix.std()
    if not spread:
        return False
    edge = spread * (matrix.shape[0] ** 0.5 + matrix.shape[1] ** 0.5)
    vector = torch.ones(matrix.shape[1]) + torch.linspace(-1, 1, matrix.shape[1])
    for _ in range(12):
        vector = matrix.T @ (matrix @ (vector / vector.norm()))
    return bool(vector.norm().sqrt() < EDGE * edge)


def head(folder: Folder) -> Iterator[Line]:
    """The head against the backbone's last layer: a copy, fresh, random, empty, or trained."""
    if not folder.head_names:
        yield Line("head", ERROR, "no tensor of a draft head", "run fastmtp.prepare_model, or export again")
        return
    last = f"model.layers.{folder.config.get('num_hidden_layers', 0) - 1}."
    pairs = {n: (folder.tensor(f"{PREFIX}0.{n}"), folder.tensor(last + n)) for n in MATRICES}
    if any(mine is None or theirs is None or mine.shape != theirs.shape for mine, theirs in pairs.values()):
        text = f"{len(folder.head_names)} tensors of another layout, such as {folder.head_names[0]}"
        yield Line("head", WARNING, text, "not compared with the last layer")
        return
    distance = {n: float((m - t).norm() / t.norm().clamp(min=1e-12)) for n, (m, t) in pairs.items()}
    entry = folder.tensor(f"{PREFIX}0.input_proj.weight")
    same = [name for name, value in distance.items() if value < 1e-3]
    if any(not mine.any() for mine, _ in pairs.values()) or entry is None or not entry.any():
        yield Line("head", ERROR, "a matrix of it is all zeros", "export the trained head again")
    elif len(same) == len(MATRICES):
        yield Line("head", ERROR, "a copy of the last layer, not trained", "train it, then fastmtp.export")
    elif len(same) >= len(MATRICES) - 2:
        yield Line("head", WARNING, "fresh from prepare_model, not trained", "train it, then fastmtp.export")
    elif all(is_random(mine) for mine, _ in pairs.values()):
        toy = all(is_random(theirs) for _, theirs in pairs.values())
        text = "random, not trained" + (", as the backbone is" if toy else "")
        yield Line("head", WARNING if toy else ERROR, text, "export the trained head again")
    else:
        mean = sum(distance.values()) / len(distance)
        yield Line("head", OK, f"distance {mean:.2f} from the last layer (0: a copy)")
