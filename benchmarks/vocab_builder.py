"""How fast `fastmtp.build_vocab` counts, and how much memory it takes: MB of text/s, tokens/s, peak of the process.

The tokenizer's load is not timed, reading, parsing, language detection and counting are. `--repeat N` counts the corpus
N times over, as one that much larger: the peak must not grow with it. `cpu` is the share of the cores that were used;
on a machine that others use as well, MB/s per core-second is the figure to compare.

    python benchmarks/vocab_builder.py --tokenizer models/qwen2 --input 'pairs/*.jsonl.gz' --column response
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from itertools import chain

from fastmtp import corpus
from fastmtp.cli import Parser, run


def main(argv: Sequence[str] | None = None) -> None:
    p = Parser(
        "python benchmarks/vocab_builder.py",
        "Time the token counter on your corpus.",
        "python benchmarks/vocab_builder.py --tokenizer models/qwen2 --input 'pairs/*.jsonl.gz' --column response",
    )
    p.add_argument("--tokenizer", required=True, help="model folder or Hub name")
    p.add_argument("--input", nargs="+", required=True, help="files or patterns, as for build_vocab")
    p.add_argument("--column", help="as for build_vocab")
    p.add_argument("--lang", help="count all text as this language (default: detect each row's, which is slower)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="threads of the tokenizer (default: all cores)")
    p.add_argument("--repeat", type=int, default=1, help="count the corpus this many times over (default 1)")
    args = p.parse_args(argv)
    os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = str(args.workers), "true"
    from fastmtp.build_vocab import load_tokenizer  # after the thread pool's size is set
    from fastmtp.token_counts import Counter, Counts

    paths = corpus.expand(args.input)
    counter = Counter(load_tokenizer(args.tokenizer), args.column, args.lang, 0.05, 0, skip_bad=False)
    counts = Counts(counter.size)
    loaded = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    counter.count(chain.from_iterable(corpus.file_chunks(paths, args.column) for _ in range(args.repeat)), counts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    megabytes = counts.text_bytes / 1e6
    print(
        f"workers {args.workers}: {megabytes:.1f} MB of text, {counts.tokens} tokens in {wall:.1f} s: "
        f"{megabytes / wall:.2f} MB/s, {counts.tokens / wall / 1e6:.2f}M tokens/s, cpu {100 * cpu / wall:.0f}%, "
        f"{megabytes / cpu:.2f} MB per core-second, peak memory {peak():.0f} MB ({loaded:.0f} MB before counting)"
    )


def peak() -> float:
    """Peak resident memory of this process in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    run(main)
