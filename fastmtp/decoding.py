"""Decode prompts with our decoder (reference/speculative.py), plain and with drafts, and compare the two.

Greedy decoding with drafts must give the plain text token for token in float32; the rows say whether it did,
and what the drafts were worth: accept length, rates by draft position, seconds.

    python -m fastmtp.decoding --model models/smollm2 --prompts examples/prompts.jsonl --split heldout \
        --out out.jsonl
    python -m fastmtp.decoding --model models/smollm2 --prompts examples/prompts.jsonl \
        --split heldout --tree 4,3,16 --out tree.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from fastmtp import files, hub
from fastmtp.checkpoint import head_files
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.prompts import read_prompts
from fastmtp.data.rendering import Refused, question_ids
from fastmtp.data.samples import check_answers
from fastmtp.fingerprint import fingerprint, machine
from fastmtp.inputs import read_jsonl, shipped
from fastmtp.reference.model import Model, check, head_for, load, put_head
from fastmtp.reference.speculative import generate
from fastmtp.show import markdown
from fastmtp.show.progress import Bar
from fastmtp.tau import summarise
from fastmtp.tokenizer import load_tokenizer
from fastmtp.trees.tree import DraftTree
from fastmtp.trees.tree_file import check_fits, parse
from fastmtp.vocab.draft_vocab import AUTO, DraftVocab, load_map, parse_maps, read


def compare(
    model: Model,
    prompts: list[dict],
    max_new_tokens: int,
    drafts: int | DraftTree,
    token_map: Tensor | DraftVocab | None,
    out: Path,
    depends: dict,
) -> list[dict]:
    """Decode every prompt greedily, plain and with drafts (order alternating); one row per prompt.

    prompts: with `prompt_ids`. Rows of an earlier run are kept if their fingerprint is `depends`.
    """
    with files.growing(out, depends) as (done, write):
        todo = [prompt for prompt in prompts if prompt["id"] not in done]
        print(f"{out}: {len(todo)} asked, {len(prompts) - len(todo)} kept", file=sys.stderr)
        if todo:  # the first pass through a network is slow, and belongs to nobody
            generate(model, todo[0]["prompt_ids"], 8, drafts, token_map=token_map)
            generate(model, todo[0]["prompt_ids"], 8, 0)
        for turn, prompt in enumerate(Bar(todo, desc="decode plain and with drafts", unit="prompt")):
            ids = prompt["prompt_ids"]
            answers = {}
            for shape in (0, drafts) if turn % 2 else (drafts, 0):
                answers[shape] = generate(model, ids, max_new_tokens, shape, token_map=token_map)
            plain, drafted = answers[0], answers[drafts]
            write(
                {
                    "id": prompt["id"],
                    "source": prompt.get("source", ""),
                    "lang": prompt.get("lang", ""),
                    "prompt_ids": ids,
                    "output_ids": drafted.ids,
                    "text": model.tokenizer.decode(drafted.ids, skip_special_tokens=True),
                    "identical": plain.ids == drafted.ids,
                    "plain_ids": plain.ids,
                    "verify_passes": drafted.verify_passes,
                    "accepted": drafted.accepted,
                    "histogram": drafted.histogram,
                    "plain_s": plain.decode_s,
                    "draft_s": drafted.decode_s,
                }
            )
    return [row for _, row in read_jsonl(out)]


def encode_prompts(tokenizer, prompts: list[dict], answer: int, context: int, path: str) -> list[dict]:
    """Each prompt with its `prompt_ids`. InputError for one that cannot be asked whole, or leaves no room for
    an answer of `answer` tokens.
    """
    encoded = []
    for prompt in prompts:
        check_answers(tokenizer, prompt["messages"], f"{path}: prompt '{prompt['id']}'")
        try:
            ids = question_ids(tokenizer, prompt["messages"], answer, context)
        except Refused as refusal:
            raise InputError(f"{path}: prompt '{prompt['id']}': {refusal}; fix or remove it") from None
        encoded.append({**prompt, "prompt_ids": ids})
    return encoded


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.decoding",
        "Decode prompts greedily, plain and with drafts; print accept length, speed-up and identity.",
        "python -m fastmtp.decoding --model models/smollm2 --prompts examples/prompts.jsonl \\\n"
        "    --split heldout --token-map vocab/smollm2/en_8k.pt --out results/decoding.jsonl\n"
        "python -m fastmtp.decoding --model models/smollm2 --prompts examples/prompts.jsonl \\\n"
        "    --split heldout --tree 4,3,16 --out results/tree.jsonl",
    )
    p.add_argument("--model", required=True, help="model in MiMo layout: a folder, or ORG/NAME on a hub")
    p.add_argument("--head", help="a checkpoint, a shipped head or one on a hub, not the model's own")
    p.add_argument("--prompts", required=True, type=shipped, help="jsonl with `messages` or `prompt`")
    p.add_argument("--split", help="use only rows whose `split` is this")
    p.add_argument("--limit", type=int, help="use only the first N prompts")
    p.add_argument("--num-steps", type=int, help="drafts per cycle, K (default 3)")
    p.add_argument(
        "--tree",
        metavar="FILE|TOPK,DEPTH,NODES",
        help="draft a tree instead: a file of fastmtp.acceptance --fit-tree, or a dynamic one as SGLang "
        "draws it; NODES counts the root",
    )
    p.add_argument("--token-map", type=shipped, help="draft only tokens of this map (.pt)")
    p.add_argument(
        "--token-maps",
        metavar="EN=PATH,ZH=PATH",
        help="a map for each language; the draft follows the text's",
    )
    p.add_argument("--vocab-policy", metavar="auto|fixed:NAME|union", help="of --token-maps (default auto)")
    p.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="identity needs float32"
    )
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", required=True, help="result rows, jsonl; an interrupted run continues")
    return p


def read_map(args, tokenizer, vocab_size: int) -> Tensor | DraftVocab | None:
    """What --token-map or --token-maps name, checked against the model's tokenizer. Raises InputError."""
    if args.token_maps and args.token_map:
        raise InputError("--token-map and --token-maps: give one of them")
    if args.vocab_policy and not args.token_maps:
        raise InputError("--vocab-policy: there are no --token-maps; give them or leave it out")
    if args.token_maps:
        return read(args.token_maps, args.vocab_policy or AUTO, tokenizer, vocab_size)
    return load_map(args.token_map, tokenizer, vocab_size) if args.token_map else None


def read_drafts(args, token_map: Tensor | DraftVocab | None, vocab_size: int) -> int | DraftTree:
    """K, or the tree of --tree, checked against the draft vocabulary. Raises InputError."""
    if not args.tree:
        args.num_steps = args.num_steps or 3
        return args.num_steps
    if args.num_steps:
        raise InputError("--num-steps and --tree: give one of them; a tree has its own depth")
    tree = parse(args.tree)
    maps = token_map.maps.values() if isinstance(token_map, DraftVocab) else [token_map]
    size = min(vocab_size if ids is None else len(ids) for ids in maps)
    check_fits(tree, args.tree, size, "the draft vocabulary")
    return tree


def dependencies(args) -> tuple[dict, list[str]]:
    """(The fingerprint of what the rows depend on, the map files)."""
    named = parse_maps(args.token_maps) if args.token_maps else {}
    maps = list(named.values()) or ([args.token_map] if args.token_map else [])
    contents = {"model": args.model, "prompts": args.prompts, "token maps": maps}
    contents["head"] = head_files(args.head) if args.head else None
    asked = ("split", "limit", "num_steps", "max_new_tokens", "dtype", "device")
    policy = {"vocab policy": (args.vocab_policy or AUTO) if named else None, "map names": list(named)}
    tree = {"tree": asdict(parse(args.tree))} if args.tree else {}
    return fingerprint(
        contents, {name: getattr(args, name) for name in asked} | policy | tree | machine()
    ), maps


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "num_steps", "max_new_tokens", "limit")

    # Everything that can be wrong is read before the weights are.
    prompts = read_prompts(args.prompts, args.split, args.limit)
    args.model = str(hub.model(args.model))
    args.token_map = hub.token_map(args.token_map) if args.token_map else None
    config, tokenizer = check(args.model, args.device), load_tokenizer(args.model)
    head = head_for(args.head, config) if args.head else None
    token_map = read_map(args, tokenizer, config.vocab_size)
    drafts = read_drafts(args, token_map, config.vocab_size)
    context = config.max_position_embeddings
    prompts = encode_prompts(tokenizer, prompts, args.max_new_tokens, context, args.prompts)
    out = Path(args.out)
    files.check_apart(out, args.model, args.prompts, args.token_map)
    files.claim(out)

    depends, maps = dependencies(args)
    model = load(args.model, args.dtype, args.device)
    if head:
        put_head(model.net, args.head, head)
    rows = compare(model, prompts, args.max_new_tokens, drafts, token_map, out, depends)
    files.write_provenance(out, vars(args), [args.prompts, *maps], depends)
    figures = summarise(rows)
    rates = " ".join(f"{rate:.3f}" for rate in figures["position_rates"] or []) or "-"
    tau, speedup = (
        markdown.number(figures[key], form) for key, form in (("accept_length", ".3f"), ("speedup", ".2f"))
    )
    print(
        f"tau={tau} speedup={speedup} identical={figures['identical']}/{figures['questions']} rates={rates}"
    )


if __name__ == "__main__":
    run(main)
