r"""Head + base -> one folder that SGLang loads as it is, and transformers with `trust_remote_code=True`.

The base's weight files are linked (copied where links are impossible), except that their head tensors give
way to the trained ones; nothing else changes, byte for byte.

    python -m fastmtp.export --base models/smollm2 --head runs/smollm2/last-checkpoint \
        --out models/smollm2-fastmtp
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from fastmtp import files
from fastmtp.checkpoint import (
    BACKBONE_FILE,
    CONTRACT,
    CONTRACT_KEY,
    HEAD_FILE,
    INDEX,
    PREFIX,
    SKIP,
    finish_folder,
    head_folder,
    link,
    read_head,
    weight_files,
)
from fastmtp.cli import InputError, Parser, run
from fastmtp.tokenizer import load_tokenizer


def export(base: str | Path, head: str | Path, out: str | Path) -> None:
    """Write folder `out`: the base with the head of checkpoint `head`, cast to the base head's dtype.

    Raises InputError for a missing folder, a checkpoint without head keys, or shapes that differ from the
    base's.
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
    tokenizer = load_tokenizer(base)
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
                    save_file(
                        {n: tensors.get_tensor(n) for n in names}, folder / target, metadata={"format": "pt"}
                    )
            index |= dict.fromkeys(names, target)
        save_file(new, folder / HEAD_FILE, metadata={"format": "pt"})
        index |= dict.fromkeys(sorted(new), HEAD_FILE)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        files.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
        for path in base.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in SKIP:
                shutil.copyfile(path, folder / path.name)
        config = files.read_json(base / "config.json") | {CONTRACT_KEY: CONTRACT}
        finish_folder(folder, config, tokenizer)
        files.write_provenance(
            folder, {"base": str(base), "head": str(head), "out": str(out)}, weight_files(head_folder(head))
        )


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.export",
        "Put a trained head into its base model: one folder for SGLang and transformers.",
        "python -m fastmtp.export --base models/mimo-7b-rl --head runs/mimo7b_k3/last-checkpoint "
        "--out models/mimo-7b-fastmtp",
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
