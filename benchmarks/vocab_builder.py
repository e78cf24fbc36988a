"""How fast `fastmtp.build_vocab` counts, and how much memory it takes: MB of text/s, tokens/s, peak of all
processes.

The tokenizer's load is not timed; reading, parsing, language detection and counting are. `--repeat N` counts
the corpus
N times over, as one that much larger: the peak must not grow with it. On a machine that others use as well,
MB per core-second is the figure to compare. Memory is sampled as PSS, which counts what workers share once;
Linux only.

    python -m benchmarks.vocab_builder --tokenizer models/qwen2 --input 'pairs/*.jsonl.gz' --column response
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Sequence
from itertools import chain

from fastmtp.cli import Parser, run
from fastmtp.tokenizer import load_tokenizer
from fastmtp.vocab import corpus
from fastmtp.vocab.token_counts import Counter, Counts


def memory() -> float:
    """Memory of this process and its workers in MB; a worker that has just ended counts nothing."""
    total = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as rollup:
            total += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return total * 1024 / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    p = Parser(
        "python -m benchmarks.vocab_builder",
        "Time the token counter on your corpus.",
        "python -m benchmarks.vocab_builder --tokenizer models/qwen2 --input 'pairs/*.jsonl.gz' --column "
        "response",
    )
    p.add_argument("--tokenizer", required=True, help="model folder or Hub name")
    p.add_argument("--input", nargs="+", required=True, help="files or patterns, as for build_vocab")
    p.add_argument("--column", help="as for build_vocab")
    p.add_argument(
        "--lang", help="count all text as this language (default: detect each row's, which is slower)"
    )
    p.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes to count with (default: all cores)"
    )
    p.add_argument("--repeat", type=int, default=1, help="count the corpus this many times over (default 1)")
    args = p.parse_args(argv)

    paths = corpus.expand(args.input)
    counter = Counter(load_tokenizer(args.tokenizer), args.column, args.lang, 0.05, 0, skip_bad=False)
    counts = Counts(counter.size)
    peak = before = memory()
    finished = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not finished.wait(0.25):
            peak = max(peak, memory())

    threading.Thread(target=sample, daemon=True).start()
    start = os.times()
    counter.count(
        chain.from_iterable(corpus.file_chunks(paths, args.column) for _ in range(args.repeat)),
        counts,
        args.workers,
    )
    end = os.times()
    finished.set()
    wall, cpu = end.elapsed - start.elapsed, sum(end[:4]) - sum(start[:4])
    megabytes = counts.text_bytes / 1e6
    print(
        f"workers {args.workers}: {megabytes:.1f} MB of text, {counts.tokens} tokens in {wall:.1f} s: "
        f"{megabytes / wall:.2f} MB/s, {counts.tokens / wall / 1e6:.2f}M tokens/s, {cpu / wall:.2f} cores, "
        f"{megabytes / cpu:.2f} MB per core-second, peak memory {peak:.0f} MB ({before:.0f} MB before "
        f"counting)"
    )


if __name__ == "__main__":
    run(main)
