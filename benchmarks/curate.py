"""Curation at scale: seconds, memory, recall of planted near-duplicates and false removals, at 100,000
samples.

The set is made of local question-answer files (`{"prompt", "response"}` a line) and, where they do not
suffice, of chats glued together from sentences of many rows. A first run removes the duplicates that are in
it by nature. Then 5 % of edited copies go in, at random places, with up to a tenth of the words replaced,
left out or inserted, and the
command runs again: every pair of which both halves survive is a miss, every other sample that falls is a
false removal.

    python -m benchmarks.curate --pairs DIR --out build/curate --results results/curate.md
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import psutil

from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.files import atomic, claim, write_jsonl, write_provenance
from fastmtp.inputs import read_jsonl
from fastmtp.vocab.lang import detect

# A word, a Chinese character or a stretch of white space; only white space is never edited.
UNIT = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+|\s+")


def word_places(text: str) -> tuple[list[str], list[int]]:
    """(units, places of the words among them)."""
    units = UNIT.findall(text)
    return units, [n for n, unit in enumerate(units) if not unit.isspace()]


def edited(text: str, count: int, vocabulary: list[str], rng: random.Random) -> str:
    """`text` with `count` words, at random places, replaced, left out or followed by a new one."""
    units, places = word_places(text)
    for place in rng.sample(places, min(count, len(places))):
        word = rng.choice(vocabulary)
        units[place] = rng.choice((word, "", f"{units[place]} {word}"))
    return "".join(units)


def plant(
    prompt: str, answer: str, share: float, vocabulary: list[str], rng: random.Random
) -> tuple[str, str]:
    """A near-copy with between one word and `share` of all words changed, spread over prompt and answer."""
    sizes = [len(word_places(text)[1]) for text in (prompt, answer)]
    changes = rng.randint(1, int(share * sum(sizes)))
    in_prompt = sum(rng.random() < sizes[0] / sum(sizes) for _ in range(changes))
    return edited(prompt, in_prompt, vocabulary, rng), edited(answer, changes - in_prompt, vocabulary, rng)


def sample(name: str, source: str, prompt: str, answer: str) -> dict:
    """A line as the distiller writes it; ids replace tokens, one per word or Chinese character."""
    ids = [zlib.crc32(w.encode()) % 49000 + 10 for w in (answer.split() if " " in answer else answer)] + [2]
    return {
        "id": name,
        "source": source,
        "lang": detect(prompt),
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer, "token_ids": ids},
        ],
        "prompt_ids": [1, *ids[:1]],
        "output_ids": ids,
        "finish": "stop",
    }


def base_rows(pairs: Path, count: int, words: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """(source, prompt, answer): the files' rows, then glued ones; with `words`, only glued ones of that many
    words.
    """
    files = sorted(pairs.glob("*.jsonl*"))
    rows = [(p.name.split(".")[0], r["prompt"], r["response"]) for p in files for _, r in read_jsonl(p)]
    if not rows:
        raise InputError(f"{pairs}: no .jsonl or .jsonl.gz file; give a folder of {{prompt, response}} files")
    rng.shuffle(rows)
    sentences = [
        s + "."
        for _, _, answer in rows
        for s in answer.replace("\n", " ").split(". ")
        if 6 <= s.count(" ") < 40
    ]
    chosen = [] if words else rows[:count]
    while len(chosen) < count:
        glued: list[str] = []
        while sum(s.count(" ") + 1 for s in glued) < (words or 60):
            glued.append(rng.choice(sentences))
        chosen.append(("glued", " ".join(glued[:2]), " ".join(glued[2:])))
    return chosen


def curate(source: Path, out: Path, workers: int) -> tuple[float, float]:
    """Run the command; (seconds, peak GB of all its processes together, shared pages counted once)."""
    command = [sys.executable, "-m", "fastmtp.curate", "--input", str(source), "--out", str(out)]
    started, peak, done = time.perf_counter(), [0.0], threading.Event()
    process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL)

    def watch() -> None:
        while not done.wait(0.5):
            total = 0
            try:
                for child in [
                    psutil.Process(process.pid),
                    *psutil.Process(process.pid).children(recursive=True),
                ]:
                    total += child.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
            peak[0] = max(peak[0], total / 1e9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if code:
        raise SystemExit(code)
    return seconds, peak[0]


def survivors(out: Path) -> set[str]:
    """Keys of the rows in train.jsonl (prompt and ids name a sample here)."""
    return {
        key(row["messages"][0]["content"], row["messages"][1]["content"]["token_ids"])
        for _, row in read_jsonl(out / "train.jsonl")
    }


def key(prompt: str, ids: list[int]) -> str:
    return f"{prompt}\n{zlib.crc32(str(ids).encode())}"


def row_key(row: dict) -> str:
    return key(row["messages"][0]["content"], row["output_ids"])


def measure(args, words: int) -> str:
    """One row of the results table."""
    rng = random.Random(args.seed)
    out = Path(args.out)
    base = base_rows(Path(args.pairs), round(args.samples * 0.95), words, rng)
    rows = [sample(f"base{n}", *row) for n, row in enumerate(base)]
    write_jsonl(out / "base.jsonl", rows)
    curate(out / "base.jsonl", out / "base", args.workers)
    dropped = json.loads((out / "base" / "counts.json").read_text())["dropped"]
    alive = survivors(out / "base")
    kept = [k for k, row in enumerate(rows) if row_key(row) in alive]
    vocabulary = [
        w for k in rng.sample(kept, min(2000, len(kept))) for w in UNIT.findall(base[k][2]) if not w.isspace()
    ]
    long_enough = [k for k in kept if len(word_places(base[k][1] + " " + base[k][2])[1]) * args.edit >= 1]
    pairs, mixed = [], [rows[k] for k in kept]
    for n, k in enumerate(rng.sample(long_enough, round(args.samples * 0.05))):
        name, prompt, answer = base[k]
        copy = sample(f"copy{n}", name, *plant(prompt, answer, args.edit, vocabulary, rng))
        pairs.append((rows[k], copy))
        mixed.append(copy)
    rng.shuffle(mixed)
    write_jsonl(out / "planted.jsonl", mixed)
    seconds, gigabytes = curate(out / "planted.jsonl", out / "planted", args.workers)
    alive = survivors(out / "planted")
    missed = Counter(
        original["source"]
        for original, copy in pairs
        if row_key(original) in alive and row_key(copy) in alive
    )
    twins = {row_key(original) for original, _ in pairs}
    wrong = sum(row_key(rows[k]) not in alive and row_key(rows[k]) not in twins for k in kept)
    wrong += sum(row_key(original) not in alive and row_key(copy) not in alive for original, copy in pairs)
    print(f"missed pairs by source: {dict(missed)}", file=sys.stderr)
    average = sum(len(row["output_ids"]) for row in mixed) / len(mixed)
    return (
        f"| {len(mixed):,} | {average:.0f} | {seconds:.0f} | {gigabytes:.2f} | "
        f"{1 - missed.total() / len(pairs):.2%} "
        f"| {wrong / len(kept):.3%} ({wrong}) | {sum(dropped.values()):,}: "
        f"{', '.join(f'{r} {n:,}' for r, n in dropped.items())} |"
    )


STORY = (
    "Read this first. A tank holds water, a tap fills it, a hole empties it, and nobody looks after either. "
)
FRAMES = [  # of prompts that differ in an operator or a number alone: (text, operators)
    ("XoY", "+-*/^%"),
    ("What is X o Y?", "+-*/^%"),
    ("请计算XoY等于多少，并写出过程。", "+-×÷"),
    (f"{STORY}Compute x^X o Y for x = 3. {STORY}", "+-*/"),
    (
        "def step(a, b):\n    total = a o b\n    return total\n\nWhat does step(X, Y) return?",
        "+ - * // % << & | ^ ==",
    ),
    ("Explain this line of C: `if (a[X] o b[Y]) return 0;`", "< > <= >= == !="),
]


def filled(text: str, values: dict[str, str]) -> str:
    """`text` with the numbers X and Y and the operator o, if it is alone, put in."""
    return re.sub(r"X|Y|\bo\b|(?<=X)o(?=Y)", lambda match: values[match[0]], text)


def operator_prompts(rng: random.Random, count: int) -> list[str]:
    """Arithmetic and code, short and long, English and Chinese, in families of the same words."""
    prompts = [
        filled(text, {"X": str(x), "Y": str(y), "o": operator})
        for text, operators in FRAMES
        for operator in (operators.split() if " " in operators else operators)
        for x in range(2, 40)
        for y in range(2, 12)
    ]
    return rng.sample(prompts, count)


def measure_operators(args) -> str:
    """How many prompts of `operator_prompts` the command keeps; their answers are words of their own."""
    rng, out = random.Random(args.seed), Path(args.out)
    rows = []
    for n, prompt in enumerate(operator_prompts(rng, 2000)):
        answer = " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(20))
        rows.append(sample(f"operator{n}", "operators", prompt, answer) | {"lang": ""})
    write_jsonl(out / "operators.jsonl", rows)
    curate(out / "operators.jsonl", out / "operators", args.workers)
    kept = len(survivors(out / "operators"))
    return f"Prompts that differ in operators and numbers alone: {kept:,} of 2,000 kept."


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.curate",
        "Time, memory, recall and false removals of curation with planted near-duplicates.",
        "python -m benchmarks.curate --pairs data/pairs --out build/curate --results results/curate.md",
    )
    p.add_argument(
        "--pairs", required=True, help='folder of .jsonl[.gz] files, {"prompt", "response"} a line'
    )
    p.add_argument("--out", required=True, help="folder for the made-up sets and the outputs")
    p.add_argument("--samples", type=int, default=100_000)
    p.add_argument(
        "--edit", type=float, default=0.1, help="most of a copy's words that are changed (default 0.1)"
    )
    p.add_argument(
        "--words", type=int, nargs="+", default=[0], help="0: the files' rows; N: glued rows of N words"
    )
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--results", help="markdown file to write the table to")
    return p


def main() -> None:
    args = parser().parse_args()
    at_least(args, 1, "samples", "workers")
    claim(args.out, folder=True)
    if args.results:
        claim(args.results)
    table = [
        "| samples | answer tokens | seconds | peak GB | recall of planted | false removals "
        "| dropped before planting |",
        "|---:|---:|---:|---:|---:|---:|---|",
        *(measure(args, words) for words in args.words),
        "",
        measure_operators(args),
    ]
    print("\n".join(table))
    write_provenance(args.out, vars(args))
    if args.results:
        words = " ".join(map(str, args.words))
        command = (
            f"python -m benchmarks.curate --pairs DIR --out DIR --samples {args.samples} --words {words}"
        )
        more = f"--workers {args.workers} --seed {args.seed}"
        text = f"# Curation\n\nMachine: {os.cpu_count()} cores. Command: `{command} {more}`\n\n"
        with atomic(args.results) as temporary:
            temporary.write_text(text + "\n".join(table) + "\n", encoding="utf-8")
        write_provenance(args.results, vars(args))


if __name__ == "__main__":
    run(main)
