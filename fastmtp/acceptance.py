"""Accept length (tau) and per-position rates of heads on finished answers, without decoding.

The computation is in reference/teacher_forced.py, of draft trees in reference/ranks.py; this command reads
the inputs, and writes tables and JSON. Trees are fitted on every other answer and judged on the rest.

    python -m fastmtp.acceptance --model models/smollm2 --data heldout.jsonl --num-steps 7 --at 1,3,5 \\
        --token-map vocab/smollm2/en_8k.pt
    python -m fastmtp.acceptance --model models/smollm2-fastmtp --data heldout.jsonl --tree 4,3,16 \\
        --fit-tree 16,3,tree16.json
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtp import files, hub
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.samples import check_measurable, read_samples
from fastmtp.inputs import shipped, whole_numbers
from fastmtp.reference.model import check, head_for, load, put_head
from fastmtp.reference.ranks import measure_ranks, measure_trees, tree_table
from fastmtp.reference.teacher_forced import FULL, Results, as_json, measure_at, pooled, table
from fastmtp.show import markdown
from fastmtp.tau import ratio
from fastmtp.tokenizer import load_tokenizer
from fastmtp.trees.fit import acceptance, fit, halves
from fastmtp.trees.tree import StaticTree
from fastmtp.trees.tree_file import check_fits, parse, parse_fit, save
from fastmtp.vocab.draft_vocab import AUTO, UNION, DraftVocab, load_map, parse_maps, union
from fastmtp.vocab.draft_vocab import read as read_vocab
from fastmtp.vocab.token_map import short_names


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.acceptance",
        "Accept length and per-position rates of a head on finished answers, from one teacher-forced pass.",
        "python -m fastmtp.acceptance --model models/smollm2-fastmtp --data data/heldout.jsonl \\\n"
        "    --num-steps 7 --at 1,3,5 --token-map vocab/smollm2/en_8k.pt\n"
        "python -m fastmtp.acceptance --model models/smollm2-fastmtp --data data/heldout.jsonl \\\n"
        "    --tree 4,3,16 --fit-tree 16,3,tree16.json",
    )
    p.add_argument("--model", required=True, help="model folder, or ORG/NAME on a hub")
    p.add_argument(
        "--head",
        action="append",
        help="a checkpoint, a shipped head or one on a hub, instead of the model's own; may be repeated",
    )
    p.add_argument(
        "--data", required=True, help="distilled or curated samples (greedy ones predict greedy decoding)"
    )
    p.add_argument("--limit", type=int, help="use only the first N samples")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle, K (default 3)")
    p.add_argument("--at", help="tau for these smaller K too, from the same pass, such as 1,3,5")
    p.add_argument(
        "--token-map",
        action="append",
        type=shipped,
        default=[],
        help="also with this map (.pt), or ORG/NAME/FILE.pt on a hub; may be repeated",
    )
    p.add_argument(
        "--token-maps",
        metavar="EN=PATH,ZH=PATH",
        help="also with each of these, their mix, their union, and following the language",
    )
    p.add_argument(
        "--tree",
        action="append",
        default=[],
        metavar="FILE|TOPK,DEPTH,NODES",
        help="also with this draft tree: a file of --fit-tree, or a dynamic one as SGLang draws it; NODES "
        "counts the root; may be repeated",
    )
    p.add_argument(
        "--fit-tree",
        action="append",
        default=[],
        metavar="NODES,DEPTH,FILE",
        help="fit a static tree on every other answer, write it to FILE, and judge all drafts on the other "
        "answers; may be repeated",
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", help="also write the figures as JSON")
    p.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    return p


def read_maps(args, tokenizer, vocab_size: int) -> tuple[dict[str, Tensor], DraftVocab | None]:
    """The maps of --token-map by name, and those of --token-maps with their union. Raises InputError."""
    names = short_names(args.token_map, (FULL, AUTO, UNION))
    maps = {
        name: load_map(path, tokenizer, vocab_size) for name, path in zip(names, args.token_map, strict=True)
    }
    if not args.token_maps:
        return maps, None
    vocab = read_vocab(args.token_maps, AUTO, tokenizer, vocab_size)
    twice = sorted(maps.keys() & vocab.maps.keys())
    if twice:
        raise InputError(f"--token-maps: '{twice[0]}' is also the name of a --token-map; rename one of them")
    return maps | {UNION: union(vocab.maps)}, vocab


def read_trees(args, maps: dict[str, Tensor], vocab: DraftVocab | None, vocab_size: int) -> dict:
    """{name: tree} of --tree, checked against the maps; --fit-tree is checked too. Raises InputError."""
    sizes = {FULL: vocab_size} | {name: len(ids) for name, ids in (vocab.maps if vocab else maps).items()}
    smallest = min(sizes, key=sizes.__getitem__)
    trees = {text: parse(text) for text in args.tree}
    for text, tree in trees.items():
        check_fits(tree, text, sizes[smallest], f"the map '{smallest}'")
    for text in args.fit_tree:
        *_, path = parse_fit(text)
        files.check_apart(path, args.data)
        if path in trees or sum(parse_fit(other)[2] == path for other in args.fit_tree) > 1:
            raise InputError(f"--fit-tree {text}: {path} is named twice; give each tree a file of its own")
    if args.fit_tree and (len(args.head or []) > 1 or len(maps) > 1 or vocab):
        raise InputError(
            "--fit-tree: a tree is fitted to one draft; give one --head and at most one --token-map"
        )
    return trees


def fit_trees(args, ranks: dict[str, list[Tensor]], head: str) -> dict[str, StaticTree]:
    """Fit, write and return the trees of --fit-tree, by file. ranks: of the answers to fit on."""
    name = list(ranks)[-1]  # the map if there is one
    trees = {}
    for nodes, depth, path in map(parse_fit, args.fit_tree):
        trees[path] = fit(ranks[name], nodes, depth)
        part = acceptance(trees[path], ranks[name])
        about = {"head": head, "data": args.data, "map": name, "answers": len(ranks[name])}
        about |= {"anchors": sum(map(len, ranks[name])), "accept_length": part.accept_length}
        save(path, trees[path], about)
        files.write_provenance(path, vars(args), [args.data, *args.token_map])
    return trees


def measured(args, model, samples, at, maps, vocab, trees, head) -> tuple[dict[int, Results], dict, str]:
    """Results of the chains by K and of the trees by name, and the tables of both, of one head."""
    if not trees and not args.fit_tree:
        chains, by_tree, extra = measure_at(model, samples, at, maps, None, vocab), {}, []
    else:
        static = [tree.depth for tree in trees.values() if isinstance(tree, StaticTree)]
        depth = max([*at, *static, *(parse_fit(text)[1] for text in args.fit_tree)])
        ranks = measure_ranks(model, samples, depth, maps, None, vocab)
        if args.fit_tree:
            parts = {name: halves(tables) for name, tables in ranks.items()}
            trees = trees | fit_trees(args, {name: first for name, (first, _) in parts.items()}, head)
            samples = halves(samples)[1]
            ranks = {name: second for name, (_, second) in parts.items()}
        shapes = {f"chain K={steps}": StaticTree.chain(steps) for steps in at} | trees
        by_tree = measure_trees(model, samples, shapes, ranks, maps, vocab)
        extra = [f"head: {head}, chains and trees\n\n{tree_table(by_tree, shapes)}\n"]
        chains = {steps: by_tree.pop(f"chain K={steps}") for steps in at}
    tables = [f"head: {head}, K={steps}\n\n{table(results)}\n" for steps, results in chains.items()]
    return chains, by_tree, "\n".join([*tables, *extra])


def ratios(by_head: dict[str, dict[int, Results]]) -> list[dict]:
    """tau of every head but the first over the first's, pooled over all answers, by map and K. The heads meet
    the same answers, so the intervals are paired.
    """
    first, *others = by_head
    names = dict.fromkeys(name for _, _, name in next(iter(by_head[first].values())))
    rows = []
    for head, name, (steps, results) in itertools.product(others, names, by_head[first].items()):
        found = ratio(pooled(by_head[head][steps], name), pooled(results, name))
        value, *interval = found or (None,)
        rows.append({"head": head, "map": name, "k": steps, "ratio": value, "interval": interval or None})
    return rows


def ratio_table(rows: list[dict], first: str) -> str:
    """The rows of `ratios` as a table."""
    lines = []
    for row in rows:
        figures = markdown.number(row["ratio"], ".3f"), markdown.interval(row["interval"], ".3f")
        lines.append([row["head"], row["map"], row["k"], *figures])
    grid = markdown.grid(["head", "map", "K", "ratio", "95 %"], lines, text=2)
    return f"tau over that of {first} on the same answers, paired intervals\n\n{grid}\n"


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "num_steps", "limit")
    at = sorted({args.num_steps, *whole_numbers("--at", args.at or "")})
    if at[0] < 1 or at[-1] > args.num_steps:
        raise InputError(f"--at must lie between 1 and --num-steps {args.num_steps}, not {args.at}")

    # Everything that can be wrong is read before the weights are.
    heads = args.head or [args.model]
    args.model = str(hub.model(args.model))
    args.token_map = [hub.token_map(path) for path in args.token_map]
    config, tokenizer = check(args.model, args.device), load_tokenizer(args.model)
    maps, vocab = read_maps(args, tokenizer, config.vocab_size)
    trees = read_trees(args, maps, vocab, config.vocab_size)
    samples = read_samples(args.data, config.vocab_size, args.limit, tokenizer)
    check_measurable(args.data, halves(samples)[1] if args.fit_tree else samples)
    heads = {name: head_for(name if args.head else args.model, config) for name in heads}
    for path in [*([args.out] if args.out else []), *(parse_fit(text)[2] for text in args.fit_tree)]:
        files.claim(path)

    model = load(args.model, args.dtype, args.device)
    chain_rows, tree_rows, tables = {steps: [] for steps in at}, defaultdict(list), []
    by_head: dict[str, dict[int, Results]] = {}
    for name, head in heads.items():
        put_head(model.net, name if args.head else args.model, head)
        by_head[name], by_tree, text = measured(args, model, samples, at, maps, vocab, trees, name)
        tables.append(text)
        for steps, results in by_head[name].items():
            chain_rows[steps] += as_json(results, name)
        for tree, results in by_tree.items():
            tree_rows[tree] += as_json(results, name)
    largest = chain_rows.pop(args.num_steps)
    figures = {"num_steps": args.num_steps, "rows": largest, "at": chain_rows}
    figures |= {"trees": tree_rows} if tree_rows else {}
    if len(heads) > 1:
        figures["ratios"] = ratios(by_head)
        tables.append(ratio_table(figures["ratios"], next(iter(heads))))
    if args.out:
        files.write_json(args.out, figures)
        sources = [*args.token_map, *(parse_maps(args.token_maps).values() if args.token_maps else [])]
        tree_files = [text for text, tree in trees.items() if isinstance(tree, StaticTree)]
        files.write_provenance(args.out, vars(args), [args.data, *sources, *tree_files])
    print(json.dumps(figures, ensure_ascii=False) if args.json else "\n".join(tables))


if __name__ == "__main__":
    run(main)
