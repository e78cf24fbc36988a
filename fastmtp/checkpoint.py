"""What a head checkpoint is: its tensor names, where it is found, how it is read and written.

A checkpoint folder holds the head alone, under the names of the released MiMo-7B checkpoints; a model folder
holds it beside the backbone. Heads that come with the package, or that a hub has, are found by name.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from fastmtp import hub
from fastmtp.budget.shapes import head_dim
from fastmtp.cli import InputError
from fastmtp.fingerprint import CACHE
from fastmtp.formats.weights import DTYPES, INDEX, Entry, check_finite, headers, read_tensors, weight_files
from fastmtp.inputs import existing, read_json
from fastmtp.tokenizer import check_same, different, load_tokenizer

PREFIX = "model.mtp_layers."
HEADS = Path(__file__).with_name("heads")  # heads that come with the package, by folder name
HEAD_FILE = "mtp_head.safetensors"
BACKBONE_FILE = (
    "backbone.safetensors"  # transformers takes a file named model.safetensors for the whole model
)
HEAD_TENSORS = frozenset(
    f"{PREFIX}0.{name}"
    for name in (
        *(f"{norm}.weight" for norm in ("token_layernorm", "hidden_layernorm", "input_layernorm")),
        *(f"{norm}.weight" for norm in ("post_attention_layernorm", "final_layernorm")),
        *("input_proj.weight", "self_attn.o_proj.weight"),
        *(f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    )
)
CODE = sorted(
    p for p in Path(__file__).with_name("head").glob("*.py") if p.name != "__init__.py"
)  # travel with a checkpoint
CONTRACT_KEY = "fastmtp"  # in config.json of folders whose head is ours: what the head was trained on
CONTRACT = {"mtp_hidden": "post_norm"}  # the backbone's state after its final norm; vLLM's own MiMo differs
ARCHITECTURE = "MiMoForCausalLM"
QUANTISED = (
    "weight_scale",
    "weight_scale_inv",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "absmax",
    "input_scale",
)
QUANTISED_BY = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # engines heed them too
FICLONE = 0x40049409  # <linux/fs.h>
ENGINE_TYPES = ("qwen2", "llama")  # qwen2: transformers rebuilds the tokenizer
SKIP = {"config.json", INDEX, "run.json", CACHE}  # not copied: written anew for each folder
LEFT_OUT = (".safetensors", ".py", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".h5")


def expected_shapes(config: dict, where: str | Path) -> dict[str, tuple[int, ...]]:
    """The tensors that a Llama, Qwen2 or MiMo configuration calls for; a tied output matrix is left out."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for name in needed:
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(f"{where}: config.json has no usable {name}; copy the folder again")
    width, inner, layers, heads, vocabulary = (config[name] for name in needed)
    size = head_dim(config)
    rows = {"q": heads * size, "k": (config.get("num_key_value_heads") or heads) * size}
    rows["v"] = rows["k"]
    mimo = config.get("architectures") == [ARCHITECTURE]
    biases = mimo or config.get("model_type") == "qwen2" or config.get("attention_bias")
    layer = {
        **{f"{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")},
        **{f"self_attn.{name}_proj.weight": (count, width) for name, count in rows.items()},
        **({f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items()} if biases else {}),
        "self_attn.o_proj.weight": (width, rows["q"]),
        **{f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")},
        "mlp.down_proj.weight": (width, inner),
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, width)
    for n in range(layers):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    if mimo:
        own = {
            f"{name}.weight": (width,) for name in ("token_layernorm", "hidden_layernorm", "final_layernorm")
        }
        own["input_proj.weight"] = (width, 2 * width)
        shapes |= {f"{PREFIX}0.{name}": shape for name, shape in (layer | own).items()}
    return shapes


def check_config(config: dict, where: str | Path) -> None:
    """InputError for a configuration that the MiMo layout cannot express, before any weight is read."""
    kind, architectures = config.get("model_type"), config.get("architectures") or [ARCHITECTURE]
    if config.get("architectures") != [ARCHITECTURE] and (
        kind not in ENGINE_TYPES or not str(architectures[0]).endswith("ForCausalLM")
    ):
        raise InputError(
            f"{where}: model type '{kind}' ({architectures[0]}) is not supported; give a Llama or Qwen2 "
            "causal language model or MiMo"
        )
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
        raise InputError(f"{where}: quantised weights ({method}); give the unquantised model")
    layers = config.get("num_nextn_predict_layers") or 1
    if config.get("architectures") == [ARCHITECTURE] and layers != 1:
        raise InputError(
            f"{where}: num_nextn_predict_layers is {layers}; FastMTP trains and serves one layer"
        )
    if config.get("attention_bias") and config.get("architectures") != [ARCHITECTURE]:
        raise InputError(
            f"{where}: attention_bias=true means output-projection biases, which the layout cannot express"
        )
    for key in ("mlp_bias", "use_sliding_window"):
        if config.get(key):
            raise InputError(f"{where}: config.json has {key}=true, which the MiMo layout cannot express")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"{where}: config.json has hidden_act={config['hidden_act']}; engines take silu alone"
        )


def check_weights(folder: str | Path) -> dict[str, Entry]:
    """Names, shapes and dtypes of a model folder against its config.json, from the headers alone.

    Raises InputError in one line that names tensors; returns the headers' entries.
    """
    folder = existing(folder, "model folder")
    config = read_json(folder / "config.json")
    check_config(config, folder)
    said = next((name for name in QUANTISED_BY if (folder / name).exists()), None)
    if said:
        raise InputError(f"{folder}: {said} says that the weights are quantised; give the unquantised model")
    entries, shapes = headers(folder), expected_shapes(config, folder)
    odd = [n for n, e in entries.items() if e.dtype not in DTYPES or n.endswith(QUANTISED)]
    if odd:
        raise InputError(
            f"{folder}: tensors that are quantised or not float32, bfloat16 or float16: {some(odd)}; "
            "give the unquantised model"
        )
    missing = [name for name in shapes if name not in entries]
    optional = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    unknown = [n for n in entries if n not in shapes and n not in optional and not n.endswith("inv_freq")]
    if missing or unknown:
        raise InputError(
            f"{folder}: the weights are not what config.json describes: {some(missing)} missing, "
            f"{some(unknown)} unknown; copy the folder again or give the model's own"
        )
    for name, shape in shapes.items():
        if entries[name].shape != shape:
            raise InputError(
                f"{folder}: {name} is {entries[name].shape}, config.json calls for {shape}; "
                "one of them is another model's"
            )
    return entries


def check_tied(entries: dict[str, Entry], config: dict, where: str | Path) -> None:
    """InputError if config.json ties the output matrix to the embedding, and the folder holds another one:
    engines would use the embedding, transformers the matrix.
    """
    pair = {n: entries[n] for n in ("lm_head.weight", "model.embed_tokens.weight") if n in entries}
    if not config.get("tie_word_embeddings") or len(pair) < 2:
        return
    rows, embedding = (tensor for _, tensor in read_tensors(pair))
    if not torch.equal(rows, embedding):
        raise InputError(
            f"{where}: config.json ties lm_head.weight to the embedding, but the two differ; set "
            "tie_word_embeddings to false, or remove lm_head.weight"
        )


def some(names: list[str]) -> str:
    return f"{len(names)}" + (
        f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    )


def head_folder(name: str | Path) -> Path:
    """The folder of a checkpoint, a model, a head of the package (`smollm2-vanilla`), or a hub's repository
    (its files that hold the head are downloaded).
    """
    if Path(name).exists():
        return Path(name)
    return HEADS / name if (HEADS / name).is_dir() else hub.head(str(name), PREFIX) or Path(name)


def head_files(name: str | Path) -> list[Path]:
    """The weight files that hold the head of what `head_folder` finds. Raises InputError."""
    return weight_files(head_folder(name), PREFIX)


def read_head(folder: str | Path) -> dict[str, torch.Tensor]:
    """Head tensors by full name, of what `head_folder` finds. InputError unless they are exactly a head."""
    folder = head_folder(folder)
    entries = {name: entry for name, entry in headers(folder, PREFIX).items() if name.startswith(PREFIX)}
    missing, unknown = sorted(HEAD_TENSORS - entries.keys()), sorted(entries.keys() - HEAD_TENSORS)
    if missing or unknown:
        raise InputError(
            f"{folder}: not a checkpoint of an MTP head: {some(missing)} tensors missing, {some(unknown)} "
            "unknown; give the folder that training wrote"
        )
    odd = [name for name, entry in entries.items() if entry.dtype not in DTYPES]
    if odd:
        raise InputError(
            f"{folder}: {odd[0]} is {entries[odd[0]].dtype}, not float32, bfloat16 or float16; "
            "give the unquantised head"
        )
    head = dict(read_tensors(entries))
    check_finite(head.items(), folder)
    return head


def head_state(name: str | Path) -> str:
    """The backbone's state that a head was trained on, `post_norm` or `pre_norm`.

    Training writes it beside the tensors, export into config.json; a head that says nothing is older than the
    choice, and is fed with the state after the final norm.
    """
    folder = head_folder(name)
    for path in head_files(folder):
        with safe_open(path, framework="pt") as tensors:
            if "mtp_hidden" in (tensors.metadata() or {}):
                return tensors.metadata()["mtp_hidden"]
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    contract = config.get(CONTRACT_KEY)
    said = contract.get("mtp_hidden") if isinstance(contract, dict) else config.get("mtp_hidden")
    return said or CONTRACT["mtp_hidden"]


def check_head(head: dict[str, torch.Tensor], config: dict, where: str | Path) -> None:
    """InputError if a head has other shapes than a MiMo configuration calls for."""
    shapes = expected_shapes(config, where)
    for name, tensor in head.items():
        if tuple(tensor.shape) != shapes[name]:
            raise InputError(
                f"{where}: {name} is {tuple(tensor.shape)}, the base calls for {shapes[name]}; "
                "give a head that was trained on this base"
            )


def is_post_norm(config: dict) -> bool:
    """Whether a folder's config.json says that its head expects the state after the final norm."""
    contract = config.get(CONTRACT_KEY)
    return isinstance(contract, dict) and contract.get("mtp_hidden") == "post_norm"


def finish_folder(folder: Path, config: dict, tokenizer=None) -> None:
    """Write config.json as engines want it, and the modelling files beside it.

    With `tokenizer`, the model type is one with which transformers reads its ids from the folder. Raises
    InputError if there is none.
    """
    own = config.get("model_type")
    types = [own, *ENGINE_TYPES] if own in ENGINE_TYPES else [*ENGINE_TYPES]
    for model_type in dict.fromkeys(types):
        _write_config(folder, config, model_type)
        if tokenizer is None or different(tokenizer, load_tokenizer(folder)) is None:
            break
    else:
        check_same(folder, tokenizer)
    for path in CODE:
        shutil.copyfile(path, folder / path.name)


def _write_config(folder: Path, config: dict, model_type: str) -> None:
    dropped = ("_name_or_path", "quantization_config")
    before = {name: value for name, value in config.items() if name not in dropped}
    own = before.get("model_type")
    config = before | {
        # engines know the type without remote code; the architecture's name brings the head
        "model_type": model_type,
        "architectures": [ARCHITECTURE],
        "num_nextn_predict_layers": 1,
        "auto_map": {
            "AutoConfig": "modeling_mimo.MiMoConfig",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
        },
        "use_cache": True,
        # without a version, transformers takes every large local tokenizer for one of Mistral's broken ones
        "transformers_version": before.get("transformers_version") or transformers.__version__,
    }
    if model_type == "llama":  # a Llama source's q/k/v biases are zeros that a plain Llama does not need
        config["attention_bias"] = before.get("attention_bias", False) if own == "llama" else True
        config.setdefault("mlp_bias", False)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # older readers look for it at the top
        config["rope_theta"] = rope["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """Copy a file; file systems that can share the blocks until one side is written (reflinks) do so."""
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
        except OSError:
            shutil.copyfileobj(old, new, 16 << 20)


def save_head(folder: Path, tensors: dict[str, torch.Tensor], hidden: str = CONTRACT["mtp_hidden"]) -> None:
    """Write a head's tensors into `folder`, as training leaves them: one file, full names. hidden: the
    backbone's state that it was trained on (`head_state`).
    """
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "mtp_hidden": hidden})
