"""Token maps: which rows of the output matrix the draft head may propose, per language, from a corpus's own
counts.

Reading the output matrix is most of a draft step, and a language uses a small part of it. A map keeps the
most frequent tokens (FR-Spec, arXiv 2502.14856; FastMTP makes it language-aware): a drafted token outside the
map is impossible, so what a map loses is acceptance, never an output. One pass over the corpus gives every
language and size, and the share of held-out text that each map covers. Best counted on the model's own
answers.

    python -m fastmtp.build_vocab --tokenizer models/smollm2 --input data/distilled.jsonl --lang en \\
        --sizes 8k,16k,32k --out vocab/smollm2
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastmtp import files, hub
from fastmtp import fingerprint as content
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.inputs import read_json
from fastmtp.tokenizer import fingerprint, load_tokenizer
from fastmtp.vocab import corpus
from fastmtp.vocab.coverage import UNION, coverage, left_out, plot, table
from fastmtp.vocab.draft_vocab import load_map
from fastmtp.vocab.lang import LANGUAGES, OTHER
from fastmtp.vocab.token_counts import COUNTED, HELD_OUT, Counter, Counts
from fastmtp.vocab.token_map import map_name, parse_size, save_token_map

LEAST_SHARE = 0.01  # of the corpus: `auto` makes no map for a language that has less


def forced_ids(tokenizer, name: str) -> np.ndarray:
    """Ids that every map holds, sorted: special and added tokens, all end tokens, and the tokens of single
    bytes.

    With the bytes in, any text can be drafted, if slowly; end tokens come from the tokenizer and from the
    model's generation_config.json and config.json if they lie beside it.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.utils import cached_file

    vocab = tokenizer.get_vocab()
    forced = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for config in ("generation_config.json", "config.json"):
        path = cached_file(name, config, _raise_exceptions_for_missing_entries=False)
        if path:
            end = read_json(path).get("eos_token_id")
            forced.update(i for i in (end if isinstance(end, list) else [end]) if type(i) is int)
    single = [
        *ByteLevel.alphabet(),
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]  # byte-level BPE; byte fallback
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    if "ByteLevel" in json.dumps([pipeline["pre_tokenizer"], pipeline["decoder"]]) or pipeline["model"].get(
        "byte_fallback"
    ):
        forced.update(vocab[token] for token in single if token in vocab)
    return np.array(sorted(forced & set(vocab.values())), dtype=np.int64)


def rank(counted: np.ndarray) -> np.ndarray:
    """Counts [V] -> the ids that occur, most frequent first, ties by id."""
    order = np.argsort(-counted, kind="stable")
    return order[: np.count_nonzero(counted)]


def union_rank(rankings: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Rankings of several languages -> one, by each id's best rank in any; at one rank, the languages' own
    order.
    """
    best = np.full(size, np.iinfo(np.int64).max)
    for turn, ranking in enumerate(rankings):
        best[ranking] = np.minimum(best[ranking], np.arange(len(ranking)) * len(rankings) + turn)
    return np.argsort(best, kind="stable")[: np.count_nonzero(best < np.iinfo(np.int64).max)]


def pick(ranking: np.ndarray, forced: np.ndarray, vocab: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """The map of `size` ids, sorted, and how many of them the corpus never had.

    Forced ids first, then by rank, then what is left of the sorted `vocab`, lowest ids first: BPE gives low
    ids to what was frequent when it was trained.
    """
    taken = np.zeros(vocab[-1] + 1, dtype=bool)
    taken[forced] = True
    taken[ranking[~taken[ranking]][: size - len(forced)]] = True
    filled = size - int(taken.sum())
    taken[vocab[~taken[vocab]][:filled]] = True
    return np.flatnonzero(taken), filled


def languages(counts: Counts, names: list[str]) -> list[str]:
    """The languages to make maps for, in order. Raises InputError if one that was named has no text."""
    seen = {lang: int(table[COUNTED].sum()) for lang, table in counts.tables.items()}
    seen = {lang: tokens for lang, tokens in sorted(seen.items(), key=lambda item: -item[1]) if tokens}
    if not seen:
        why = f"; {counts.bad} rows were skipped, the first: {counts.first_bad}" if counts.bad else ""
        raise InputError(
            f"nothing to count in the corpus ({counts.rows} rows outside and inside the held-out slice){why}"
        )
    chosen = [lang for lang in names if lang != "auto"]
    for lang in chosen:
        if lang not in seen:
            raise InputError(f"no text in '{lang}' to count; the corpus has {', '.join(seen)}")
    if "auto" in names:
        enough = LEAST_SHARE * sum(seen.values())
        chosen += [n for n, tokens in seen.items() if n not in (*chosen, OTHER) and tokens >= enough]
    if not chosen:
        raise InputError(
            f"all text to count ({seen[OTHER]} tokens) is in scripts that we cannot tell apart; if it is in "
            "one language, name that: --lang NAME"
        )
    return chosen


def gather(args, tokenizer, paths: list[Path], names: list[str]) -> Counts:
    """Count the corpus, continuing a count that was cut short if asked to."""
    fixed = names[0] if len(names) == 1 and names != ["auto"] else None
    counter = Counter(tokenizer, args.column, fixed, args.held_out, args.seed, args.on_error == "skip")
    state = state_path(args, tokenizer, paths, fixed)
    counts = Counts(counter.size)
    if args.resume and state.exists():
        counts = Counts.load(state)
        print(f"continuing after {counts.rows} rows, {counts.tokens} tokens", file=sys.stderr)
    if args.dataset:
        chunks, total = corpus.dataset_chunks(args.dataset, args.split, args.column), None
    else:
        chunks, total = corpus.file_chunks(paths, args.column), sum(path.stat().st_size for path in paths)
    try:
        counter.count(chunks, counts, args.workers, state, total)
    except KeyboardInterrupt:
        then = "with --resume continues" if state.exists() else "starts from the beginning"
        print(f"fastmtp.build_vocab: interrupted; the same command {then}", file=sys.stderr)
        raise SystemExit(1) from None
    state.unlink(missing_ok=True)
    return counts


def state_path(args, tokenizer, paths: list[Path], fixed: str | None) -> Path:
    """Where a count's tables are kept while it runs; another corpus or other rules have another name."""
    rules = {
        name: getattr(args, name) for name in ("dataset", "split", "column", "held_out", "seed", "on_error")
    }
    rules |= {"tokenizer": fingerprint(tokenizer), "lang": fixed}
    return Path(args.out) / f".counts.{content.digest(content.fingerprint({'corpus': paths}, rules))}.npz"


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.build_vocab",
        "Token maps for a cheaper draft: each language's most frequent tokens, in the sizes you ask for.",
        "python -m fastmtp.build_vocab --tokenizer models/smollm2 --input data/distilled.jsonl --lang en \\\n"
        "    --sizes 8k,16k,32k --out vocab/smollm2\n"
        "python -m fastmtp.build_vocab --tokenizer Qwen/Qwen2-7B-Instruct --input 'pairs/*.jsonl.gz' \\\n"
        "    --column response --lang en,zh --sizes 8k,16k,32k,64k --out vocab/qwen2 --compare freq_32768.pt",
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        help=f"files or patterns ({', '.join(corpus.SUFFIXES)}): distilled samples, chats, texts",
    )
    source.add_argument("--dataset", help="Hub data set, or a local folder that `datasets` reads; streamed")
    p.add_argument("--split", default="train", help="of --dataset (default train)")
    p.add_argument(
        "--column", help="text, chat or token ids to count (default: messages, output_ids or text)"
    )
    p.add_argument("--tokenizer", required=True, help="model folder, or ORG/NAME on a hub")
    p.add_argument(
        "--lang",
        default="auto",
        help="one name: all text is in it. Several (en,zh): each row's is found, others are left out. "
        f"auto (default): every language with 1%% of the text. Told apart: {', '.join(LANGUAGES)}",
    )
    p.add_argument("--sizes", default="8k,16k,32k", help="ids in a map, k is 1024 (default 8k,16k,32k)")
    p.add_argument("--out", required=True, help="folder for LANG_SIZE.pt, .json and coverage.png")
    p.add_argument("--corpus", help="the corpus in words, for the maps' JSON (default: the files' names)")
    p.add_argument(
        "--compare", nargs="+", default=[], help="other maps, whose coverage is printed on the same text"
    )
    p.add_argument(
        "--held-out", type=float, default=0.05, help="share of rows to measure on, not counted (default 0.05)"
    )
    p.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a broken row (default stop)"
    )
    p.add_argument("--resume", action="store_true", help="continue a count that was interrupted")
    p.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes to count with (default: all cores)"
    )
    p.add_argument("--seed", type=int, default=0, help="chooses the held-out rows")
    return p


def check_arguments(args) -> tuple[list[str], list[int], list[Path]]:
    """Names of languages, sizes and files to read. Raises InputError for what cannot be."""
    names = list(dict.fromkeys(args.lang.split(",")))
    for lang in names:
        if not (lang.isascii() and lang.isalpha() and lang not in (UNION, OTHER)):
            raise InputError(f"lang '{lang}': expected names such as en or zh, or auto")
        if len(names) > 1 and lang not in (*LANGUAGES, "auto"):
            raise InputError(
                f"lang '{lang}' cannot be told from others by its script; count it alone, with --lang {lang}"
            )
    if not 0 <= args.held_out < 1:
        raise InputError(f"--held-out {args.held_out}: expected a share from 0 up to, not including, 1")
    at_least(args, 1, "workers")
    sizes = sorted({parse_size(text) for text in args.sizes.split(",")})
    return names, sizes, corpus.expand(args.input or [])


def check_sizes(sizes: list[int], vocab: np.ndarray, forced: np.ndarray) -> None:
    """InputError for maps larger than the vocabulary, or too small for what every map holds."""
    if sizes[-1] > len(vocab):
        raise InputError(f"--sizes: {sizes[-1]} is more than the tokenizer's {len(vocab)} ids; leave it out")
    if sizes[0] < len(forced):
        raise InputError(
            f"--sizes: {sizes[0]} is less than the {len(forced)} special and byte tokens of every map"
        )


def claim(out: Path, names: list[str], sizes: list[int], compared: list[str]) -> None:
    """Claim the folder before minutes are spent; InputError if somebody else's file would be replaced."""
    files.claim(out, folder=True)
    maps = [map_name(name, size) for name in (*names, UNION) for size in sizes if name != "auto"]
    for name in [*(f"{name}{end}" for name in maps for end in (".pt", ".json")), "coverage.png"]:
        files.check_output(out / name)
        files.check_apart(out / name, *compared)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    names, sizes, paths = check_arguments(args)
    source = str(hub.tokenizer(args.tokenizer))
    tokenizer = load_tokenizer(source)
    vocab = np.array(sorted(set(tokenizer.get_vocab().values())), dtype=np.int64)
    forced = forced_ids(tokenizer, source)
    check_sizes(sizes, vocab, forced)
    compared = {
        path: load_map(hub.token_map(path), tokenizer, int(vocab[-1]) + 1).numpy() for path in args.compare
    }
    out = Path(args.out)
    claim(out, names, sizes, args.compare)

    # One pass over the corpus, then each language's and size's map from the same counts.
    counts = gather(args, tokenizer, paths, names)
    langs = languages(counts, names)
    rankings = {lang: rank(counts.tables[lang][COUNTED]) for lang in langs}
    if len(langs) > 1:
        rankings[UNION] = union_rank(list(rankings.values()), counts.size)
    held_out = {lang: counts.tables[lang][HELD_OUT] for lang in langs}
    picked = {
        map_name(n, size): (n, *pick(r, forced, vocab, size)) for n, r in rankings.items() for size in sizes
    }

    command = shlex.join(["python", "-m", "fastmtp.build_vocab", *(sys.argv[1:] if argv is None else argv)])
    sources = [path.name for path in paths] or [f"{args.dataset}[{args.split}]"]
    for name, (lang, ids, filled) in picked.items():
        about = {
            "lang": lang,
            "tokenizer": {
                "name": Path(args.tokenizer).name if Path(args.tokenizer).exists() else args.tokenizer,
                "sha256_of_vocabulary": fingerprint(tokenizer),
                "ids": len(vocab),
            },
            "corpus": args.corpus or ", ".join(sources),
            "tokens_counted": {n: int(counts.tables[n][COUNTED].sum()) for n in langs},
            "tokens_held_out": {n: int(t.sum()) for n, t in held_out.items()},
            "coverage_of_held_out": {n: coverage(ids, t) for n, t in held_out.items()},
            "ids_forced": len(forced),
            "ids_not_in_corpus": filled,
            "command": command,
        }
        save_token_map(out / f"{name}.pt", torch.from_numpy(ids), about)
    if any(tokens.sum() for tokens in held_out.values()):
        plot(out / "coverage.png", rankings, held_out, sizes)
    files.write_provenance(out, vars(args), [*paths, *args.compare])
    report(counts, langs)
    print(table({name: ids for name, (_, ids, _) in picked.items()}, held_out, compared))


def report(counts: Counts, langs: list[str]) -> None:
    """Print what was counted, left out and skipped."""
    counted = ", ".join(f"{lang} {table.sum()}" for lang, table in counts.tables.items())
    print(f"{counts.rows} rows, {counts.tokens} tokens: {counted}")
    if (rest := left_out(counts, langs)) is not None:
        print(rest)
    if counts.bad:
        print(f"{counts.bad} broken rows skipped, the first: {counts.first_bad}")


if __name__ == "__main__":
    run(main)
