r"""Head + base -> one folder that SGLang, vLLM with our plugin and transformers load as it is.

With `--for vllm-stock` the output holds two folders, for a vLLM on which our plugin cannot be installed, and
a README.md with the command that starts it.

The base's weight files are linked (copied where links are impossible), except that their head tensors give
way to the trained ones; nothing else changes, byte for byte. README.md is a model card of what is known; one
that somebody edited is kept.

    python -m fastmtp.export --base models/smollm2 --head runs/smollm2/last-checkpoint \
        --out models/smollm2-fastmtp
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from fastmtp import files, hub
from fastmtp.checkpoint import (
    BACKBONE_FILE,
    CONTRACT,
    CONTRACT_KEY,
    HEAD_FILE,
    LEFT_OUT,
    PREFIX,
    SKIP,
    check_head,
    check_tied,
    check_weights,
    copy,
    finish_folder,
    head_files,
    head_folder,
    head_state,
    read_head,
)
from fastmtp.cli import InputError, Parser, run
from fastmtp.engines.vllm_stock import MODEL, add_backbone
from fastmtp.fingerprint import CACHE
from fastmtp.formats.weights import INDEX, Entry, check_finite, read_tensors
from fastmtp.head.modeling_mimo import HIDDEN
from fastmtp.inputs import read_json
from fastmtp.show import card
from fastmtp.tokenizer import check_fits, copy_templates, load_tokenizer


def export(
    base: str | Path, head: str | Path, out: str | Path, vllm_stock: bool = False, repo: str | None = None
) -> None:
    """Write folder `out`: the base with the head of checkpoint `head`, cast to the base head's dtype, and a
    model card that names `repo`, where it will be pushed, or the folder.

    vllm_stock: two folders in `out`, see fastmtp/engines/vllm_stock.py.

    Raises InputError for a base or a head that is not whole, or that do not fit each other.
    """
    base, out = hub.model(base), Path(out)
    if any(Path(given).resolve().is_relative_to(out.resolve()) for given in (base, head)):
        raise InputError(f"{out}: the output must be a new folder, not one of the inputs or around them")
    files.check_output(out)
    kept = _edited_card(out)
    old, new = read_head(base), read_head(head)
    entries, config = check_weights(base), read_json(base / "config.json")
    check_head(new, config, head)
    new = {name: tensor.to(old[name].dtype).contiguous() for name, tensor in new.items()}
    check_finite(new.items(), f"{head} in {base}'s dtype")
    contract = {"mtp_hidden": head_state(head)}
    if (state := contract["mtp_hidden"]) not in HIDDEN:
        raise InputError(
            f"{head}: mtp_hidden is '{state}', must be {' or '.join(HIDDEN)}; fix its config.json"
        )
    if vllm_stock and contract["mtp_hidden"] != CONTRACT["mtp_hidden"]:
        raise InputError(
            f"{head}: it was trained for vLLM's own MiMo, which serves the usual folder; omit --for"
        )
    contract |= {CONTRACT_KEY: CONTRACT | contract}  # the first for transformers, the second for engines
    tokenizer = load_tokenizer(base)
    check_fits(base, tokenizer, config["vocab_size"])
    check_tied(entries, config, base)
    check_finite(read_tensors(entries), base)
    with files.atomic(out) as folder:
        target = folder / MODEL if vllm_stock else folder
        target.mkdir(parents=True)
        _write_weights(target, entries, new)
        for path in base.iterdir():
            if path.is_file() and path.suffix not in LEFT_OUT and path.name not in {*SKIP, card.README}:
                shutil.copyfile(path, target / path.name)
        copy_templates(Path(base), target)
        finish_folder(target, config | contract, tokenizer)
        if vllm_stock:
            add_backbone(folder)
        else:
            known = card.facts(base, head_folder(head), contract["mtp_hidden"])
            (folder / card.README).write_text(
                kept or card.card(known, Path(repo or out).name, repo or out.name), "utf-8"
            )
        files.write_provenance(
            folder, {"base": str(base), "head": str(head), "out": str(out)}, head_files(head)
        )


def _edited_card(folder: Path) -> str | None:
    """The text of a card of ours that somebody changed."""
    path = folder / card.README
    text = path.read_text("utf-8", errors="replace") if path.is_file() else None
    return None if text is None or card.untouched(text) else text


def check_push(repo: str, vllm_stock: bool) -> set[str] | None:
    """The repository's files (None: there is none yet), before any work. InputError for what cannot be
    pushed, or would mix with somebody's files.
    """
    if vllm_stock:
        raise InputError("--push with --for vllm-stock: push the usual folder; omit one of them")
    name = hub.FORM.fullmatch(repo)
    if not name or name["path"] or name["revision"]:
        raise InputError(f"--push {repo}: expected ORG/NAME")
    present = hub.files_of(repo)
    if present and HEAD_FILE not in present and present - hub.AT_BIRTH:
        other = min(present - hub.AT_BIRTH)
        raise InputError(f"--push {repo}: the repository holds other files ({other}); give a new name")
    return present


def push(folder: Path, repo: str, present: set[str] | None) -> str:
    """Bring an exported folder to the hub; the address. A card that somebody edited there stays."""
    but = ["run.json", CACHE, f"{CACHE}.tmp"]
    if present and HEAD_FILE in present and card.README in present:
        remote = hub.fetch(hub.Name(repo, repo, "", None), (card.README,))
        but += [card.README] if _edited_card(remote) else []
    return hub.push(folder, repo, present is None, but)


def _write_weights(folder: Path, entries: dict[str, Entry], head: dict) -> None:
    """The backbone's files, without the head's tensors, the new head, and an index of both."""
    index = {}
    for path in sorted({entry.path for entry in entries.values()}):
        inside = {name: entry for name, entry in entries.items() if entry.path == path}
        kept = {name: entry for name, entry in inside.items() if not name.startswith(PREFIX)}
        target = BACKBONE_FILE if path.name == "model.safetensors" else path.name
        if kept == inside:
            copy(path, folder / target)
        elif kept:
            save_file(dict(read_tensors(kept)), folder / target, metadata={"format": "pt"})
        index |= dict.fromkeys(kept, target)
    save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})
    index |= dict.fromkeys(sorted(head), HEAD_FILE)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    files.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.export",
        "Put a trained head into its base model: one folder for SGLang, vLLM and transformers.",
        "python -m fastmtp.export --base models/mimo-7b-rl --head runs/mimo7b_k3/last-checkpoint "
        "--out models/mimo-7b-fastmtp",
    )
    p.add_argument(
        "--base", required=True, help="model that the head was trained on: a folder, or ORG/NAME on a hub"
    )
    p.add_argument(
        "--head", required=True, help="checkpoint that training wrote, or ORG/NAME of a head on a hub"
    )
    p.add_argument("--out", required=True, help="new model folder")
    p.add_argument(
        "--for",
        dest="target",
        choices=("engines", "vllm-stock"),
        default="engines",
        help="vllm-stock: two folders for a vLLM without our plugin (default: one folder for every engine)",
    )
    p.add_argument(
        "--push", metavar="ORG/NAME", help="also upload it; a new repository is private (FASTMTP_HUB: where)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    stock = args.target == "vllm-stock"
    present = check_push(args.push, stock) if args.push else None
    export(args.base, args.head, args.out, stock, args.push)
    print(f"exported {args.out}")
    if args.push:
        print(f"pushed {push(Path(args.out), args.push, present)}")


if __name__ == "__main__":
    run(main)
