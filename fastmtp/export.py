"""Head + base -> one folder that SGLang loads as it is, and transformers with `trust_remote_code=True`.

The base's weight files are linked (copied where links are impossible), except that their head tensors give way to
the trained ones; nothing else changes, byte for byte.

    python -m fastmtp.export --base models/smollm2 --head runs/smollm2/last-checkpoint --out models/smollm2-fastmtp
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastmtp import files
from fastmtp.cli import InputError, Parser, run

PREFIX = "model.mtp_layers."
HEADS = Path(__file__).with_name("heads")  # heads that come with the package, by folder name
HEAD_FILE = "mtp_head.safetensors"
BACKBONE_FILE = "backbone.safetensors"  # transformers takes a file named model.safetensors for the whole model
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
CODE_FILES = ("modeling_mimo.py", "recursion.py", "varlen.py", "losses.py", "row_loss.py", "teacher.py")
INDEX = "model.safetensors.index.json"
SKIP = {"config.json", INDEX, "run.json", *CODE_FILES}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model or checkpoint folder. Raises InputError where there are none."""
    found = sorted(files.existing(folder, "folder").glob("*.safetensors"))
    if not found:
        raise InputError(f"{folder}: no .safetensors file; give a model or checkpoint folder")
    return found


def head_folder(name: str | Path) -> Path:
    """The folder of a checkpoint, a model, or a head that comes with the package, such as `smollm2-vanilla`."""
    return Path(name) if Path(name).exists() or not (HEADS / name).is_dir() else HEADS / name


def read_head(folder: str | Path) -> dict[str, torch.Tensor]:
    """Head tensors by full name, of what `head_folder` finds. InputError unless they are exactly a head."""
    folder = head_folder(folder)
    head = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                head |= {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(PREFIX)}
        except SafetensorError as error:
            raise InputError(f"{path}: not a readable safetensors file ({error}); copy it again") from None
    if head.keys() != HEAD_TENSORS:
        missing, extra = sorted(HEAD_TENSORS - head.keys()), sorted(head.keys() - HEAD_TENSORS)
        what = f"lacks {missing[0]} ({len(missing)} missing)" if missing else f"has an unknown tensor {extra[0]}"
        raise InputError(f"{folder}: not a checkpoint of an MTP head: {what}; give the folder that training wrote")
    return head


def finish_folder(folder: Path, config: dict) -> None:
    """Write config.json as engines want it (the comments say why), and the modelling files beside it."""
    config = {
        **{k: v for k, v in config.items() if k not in ("_name_or_path", "quantization_config", "transformers_version")},
        "model_type": "qwen2",  # engines load it without remote code; the architecture name brings the head
        "architectures": ["MiMoForCausalLM"],
        "num_nextn_predict_layers": 1,
        "auto_map": {
            "AutoConfig": "modeling_mimo.MiMoConfig",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
        },
        "use_cache": True,
    }
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # older readers look for it at the top
        config["rope_theta"] = rope["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)


def export(base: str | Path, head: str | Path, out: str | Path) -> None:
    """Write folder `out`: the base with the head of checkpoint `head`, cast to the base head's dtype.

    Raises InputError for a missing folder, a checkpoint without head keys, or shapes that differ from the base's.
    """
    base, out = files.existing(base, "model folder"), Path(out)
    if any(Path(given).resolve().is_relative_to(out.resolve()) for given in (base, head)):
        raise InputError(f"{out}: the output must be a new folder, not one of the inputs or around them")
    old, new = read_head(base), read_head(head)
    for name, tensor in new.items():
        if tensor.shape != old[name].shape:
            raise InputError(
                f"{head}: {name} is {tuple(tensor.shape)}, the base has {tuple(old[name].shape)}; "
                "export onto the base that the head was trained on"
            )
    new = {name: tensor.to(old[name].dtype).contiguous() for name, tensor in new.items()}
    with files.atomic(out) as folder:
        folder.mkdir()
        index = {}
        for path in weight_files(base):
            with safe_open(path, framework="pt") as tensors:
                names = [name for name in tensors.keys() if not name.startswith(PREFIX)]
                target = BACKBONE_FILE if path.name == "model.safetensors" else path.name
                if len(names) == len(tensors.keys()):
                    link(path, folder / target)
                elif names:
                    save_file({n: tensors.get_tensor(n) for n in names}, folder / target, metadata={"format": "pt"})
            index |= dict.fromkeys(names, target)
        save_file(new, folder / HEAD_FILE, metadata={"format": "pt"})
        index |= dict.fromkeys(sorted(new), HEAD_FILE)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        files.write_json(
            folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index}
        )
        for path in base.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in SKIP:
                shutil.copyfile(path, folder / path.name)
        finish_folder(folder, files.read_json(base / "config.json"))
        files.write_provenance(
            folder, {"base": str(base), "head": str(head), "out": str(out)}, weight_files(head_folder(head))
        )


def link(source: Path, target: Path) -> None:
    """Hard-link a weight file, which costs nothing; copy across file systems."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.export",
        "Put a trained head into its base model: one folder for SGLang and transformers.",
        "python -m fastmtp.export --base models/mimo-7b-rl --head runs/mimo7b_k3/last-checkpoint --out models/mimo-7b-fastmtp",
    )
    p.add_argument("--base", required=True, help="model folder that the head was trained on")
    p.add_argument("--head", required=True, help="checkpoint folder that training wrote")
    p.add_argument("--out", required=True, help="new model folder")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    export(args.base, args.head, args.out)
    print(f"exported {args.out}")


if __name__ == "__main__":
    run(main)
