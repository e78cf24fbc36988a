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

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastmtp import files
from fastmtp.cli import InputError, Parser, run
from fastmtp.tokenizer import fingerprint, load_tokenizer
from fastmtp.vocab import corpus
from fastmtp.vocab.lang import LANGUAGES, OTHER
from fastmtp.vocab.token_counts import COUNTED, HELD_OUT, Counter, Counts
from fastmtp.vocab.token_map import load_token_map, map_name, parse_size, save_token_map, size_name

UNION = "union"
LEAST_SHARE = 0.01  # of the corpus: `auto` makes no map for a language that has less


def forced_ids(tokenizer, name: str) -> np.ndarray:
    """Ids that every map holds, sorted: special and added tokens, all end tokens, and the tokens of single
    bytes.

    With the bytes in, any text can be drafted, if slowly; end tokens come from the tokenizer and from the
    model's generation_config.json and config.json where they lie beside it.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.utils import cached_file

    vocab = tokenizer.get_vocab()
    forced = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for config in ("generation_config.json", "config.json"):
        path = cached_file(name, config, _raise_exceptions_for_missing_entries=False)
        if path:
            end = json.loads(Path(path).read_text(encoding="utf-8")).get("eos_token_id")
            forced.update(end if isinstance(end, list) else [] if end is None else [end])
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


def coverage(ids: np.ndarray, counted: np.ndarray) -> float | None:
    """Share of a count's tokens that are in the map; None for an empty count."""
    total = counted.sum()
    return float(counted[ids].sum() / total) if total else None


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
            f"all text to count ({seen[OTHER]} tokens) is in scripts that are not told apart; if it is in one "
            "language, name that: --lang NAME"
        )
    return chosen


def left_out(counts: Counts, langs: list[str]) -> str | None:
    """One line about text for which no map was made; None if there is none."""
    rest = {lang: int(table.sum()) for lang, table in counts.tables.items() if lang not in langs}
    about = {OTHER: " in scripts that are not told apart"}
    parts = [f"{lang} {tokens} tokens{about.get(lang, '')}" for lang, tokens in rest.items() if tokens]
    return f"left out, no map made: {', '.join(parts)}" if parts else None


def table(maps: dict[str, np.ndarray], held_out: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> str:
    """Coverage of each map (rows) on each language's held-out text (columns), and what languages' maps share."""
    width = max(map(len, ["held-out tokens", *maps, *given]))
    lines = [f"{'map':<{width}} {'ids':>7}" + "".join(f"{lang:>9}" for lang in held_out)]
    lines.append(
        f"{'held-out tokens':<{width}} {'':>7}" + "".join(f"{t.sum():>9}" for t in held_out.values())
    )
    for name, ids in [*maps.items(), *given.items()]:
        shares = [coverage(ids, tokens) for tokens in held_out.values()]
        cells = "".join(f"{'-':>9}" if share is None else f"{100 * share:>8.2f}%" for share in shares)
        lines.append(f"{name:<{width}} {len(ids):>7}{cells}")
    names = [name for name in maps if not name.startswith(UNION)]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if len(maps[one]) == len(maps[other]):
                shared = len(np.intersect1d(maps[one], maps[other]))
                lines.append(f"{one} and {other} share {shared} ids ({100 * shared / len(maps[one]):.1f}%)")
    return "\n".join(lines)


def plot(
    path: Path, rankings: dict[str, np.ndarray], held_out: dict[str, np.ndarray], sizes: list[int]
) -> None:
    """PNG: rank against the share of held-out text covered so far; colours are texts, line styles are
    rankings.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    styles = dict(zip(rankings, ["-", "--", "-.", ":"] * len(rankings), strict=False))
    for colour, (lang, tokens) in enumerate(held_out.items()):
        for name, ranking in rankings.items():
            if tokens.sum():
                covered = tokens[ranking].cumsum() / tokens.sum()
                label = f"{lang} text, {name} ranking ({100 * covered[-1]:.1f} % at its end)"
                axes.plot(
                    np.arange(1, len(covered) + 1), covered, styles[name], color=f"C{colour}", label=label
                )
    for size in sizes:
        axes.axvline(size, color="0.8", linewidth=0.8, zorder=0)
        axes.text(size, 0.01, size_name(size), rotation=90, fontsize=7, color="0.4", ha="right")
    axes.set(
        xscale="log",
        ylim=(0, 1.01),
        xlabel="rank of the token in the counted text",
        ylabel="share of held-out tokens",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with files.atomic(path) as temporary:
        # No version in the file's metadata: the same counts give the same bytes.
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)


def gather(args, tokenizer, paths: list[Path], wanted: list[str]) -> Counts:
    """Count the corpus, continuing a count that was cut short if asked to; its tables are removed by `main`."""
    fixed = wanted[0] if len(wanted) == 1 and wanted != ["auto"] else None
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
        print(
            "python -m fastmtp.build_vocab: interrupted; the same command with --resume continues",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    state.unlink(missing_ok=True)
    return counts


def state_path(args, tokenizer, paths: list[Path], fixed: str | None) -> Path:
    """Where a count's tables are kept while it runs; another corpus or other rules have another name."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    rules = [
        fingerprint(tokenizer),
        stats,
        args.dataset,
        args.split,
        args.column,
        fixed,
        args.held_out,
        args.seed,
    ]
    tag = hashlib.sha256(json.dumps([*rules, args.on_error]).encode()).hexdigest()[:12]
    return Path(args.out) / f".counts.{tag}.npz"


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.build_vocab",
        "Token maps for a cheaper draft: each language's most frequent tokens, in the sizes you ask for.",
        "python -m fastmtp.build_vocab --tokenizer models/smollm2 --input data/distilled.jsonl --lang en \\\n"
        "    --sizes 8k,16k,32k --out vocab/smollm2\n"
        "python -m fastmtp.build_vocab --tokenizer Qwen/Qwen2-7B-Instruct --input 'pairs/*.jsonl.gz' --column response \\\n"
        "    --lang en,zh --sizes 8k,16k,32k,64k --out vocab/qwen2 --compare freq_32768.pt",
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
    p.add_argument("--tokenizer", required=True, help="model folder or Hub name")
    p.add_argument(
        "--lang",
        default="auto",
        help="one name: all text is in it. Several (en,zh): each row's is found, others are left out. auto (default): "
        f"every language with 1%% of the text. Told apart: {', '.join(LANGUAGES)}",
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


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    wanted = list(dict.fromkeys(args.lang.split(",")))
    sizes = sorted({parse_size(text) for text in args.sizes.split(",")})
    for lang in wanted:
        if not (lang.isascii() and lang.isalpha() and lang not in (UNION, OTHER)):
            raise InputError(f"lang '{lang}': expected names such as en or zh, or auto")
        if len(wanted) > 1 and lang not in (*LANGUAGES, "auto"):
            raise InputError(
                f"lang '{lang}' cannot be told from others by its script; count it alone, with --lang {lang}"
            )
    if not 0 <= args.held_out < 1:
        raise InputError(f"--held-out {args.held_out}: expected a share from 0 up to, not including, 1")
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: expected at least 1")
    paths = corpus.expand(args.input or [])
    tokenizer = load_tokenizer(args.tokenizer)
    vocab = np.array(sorted(set(tokenizer.get_vocab().values())), dtype=np.int64)
    forced = forced_ids(tokenizer, args.tokenizer)
    if sizes[-1] > len(vocab):
        raise InputError(f"--sizes: {sizes[-1]} is more than the tokenizer's {len(vocab)} ids; leave it out")
    if sizes[0] < len(forced):
        raise InputError(
            f"--sizes: {sizes[0]} is less than the {len(forced)} special and byte tokens of every map"
        )
    given = {path: load_token_map(path, int(vocab[-1]) + 1).numpy() for path in args.compare}

    counts = gather(args, tokenizer, paths, wanted)
    langs = languages(counts, wanted)
    rankings = {lang: rank(counts.tables[lang][COUNTED]) for lang in langs}
    if len(langs) > 1:
        rankings[UNION] = union_rank(list(rankings.values()), counts.size)
    held_out = {lang: counts.tables[lang][HELD_OUT] for lang in langs}
    meaning = fingerprint(tokenizer)
    picked = {
        map_name(n, size): (n, *pick(r, forced, vocab, size)) for n, r in rankings.items() for size in sizes
    }

    out = Path(args.out)
    command = shlex.join(["python", "-m", "fastmtp.build_vocab", *(sys.argv[1:] if argv is None else argv)])
    names = [path.name for path in paths] or [f"{args.dataset}[{args.split}]"]
    for name, (lang, ids, filled) in picked.items():
        about = {
            "lang": lang,
            "tokenizer": {
                "name": Path(args.tokenizer).name if Path(args.tokenizer).exists() else args.tokenizer,
                "sha256_of_vocabulary": meaning,
                "ids": len(vocab),
            },
            "corpus": args.corpus or ", ".join(names),
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
    counted = ", ".join(f"{lang} {t[COUNTED].sum() + t[HELD_OUT].sum()}" for lang, t in counts.tables.items())
    print(f"{counts.rows} rows, {counts.tokens} tokens: {counted}")
    if (rest := left_out(counts, langs)) is not None:
        print(rest)
    if counts.bad:
        print(f"{counts.bad} broken rows skipped, the first: {counts.first_bad}")
    print(table({name: ids for name, (_, ids, _) in picked.items()}, held_out, given))


if __name__ == "__main__":
    run(main)
