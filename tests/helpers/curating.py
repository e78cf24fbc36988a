"""Distilled samples with words of their own, and `fastmtp.curate` over them in this process."""

import gzip
import json
import random

from fastmtp import curate

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rk", "st", "l")]
IDS = {word: 10 + n for n, word in enumerate(WORDS)}


def line(n, source="s", turns=1, length=30, **changes):
    """A distilled sample with words of its own, and a token id for each word."""
    rng = random.Random(f"{source} {n}")
    messages = []
    for _ in range(turns):
        answer = rng.choices(WORDS, k=length)
        ids = [IDS[word] for word in answer] + [2]
        messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=12)) + "?"})
        messages.append({"role": "assistant", "content": " ".join(answer), "token_ids": ids})
    sample = {
        "id": str(n),
        "source": source,
        "lang": "en",
        "messages": messages,
        "prompt_ids": [1, 5],
        "output_ids": ids,
    }
    return sample | {"finish": "stop"} | changes


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as out:
        out.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return str(path)


def read(path):
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def run(tmp_path, rows, *options):
    """Curate `rows` in this process; (train rows, eval rows, counts)."""
    out = tmp_path / "out"
    source = write(tmp_path / "distilled.jsonl", rows)
    curate.main(["--input", source, "--out", str(out), "--workers", "1", *map(str, options)])
    return read(out / "train.jsonl"), read(out / "eval.jsonl"), json.loads((out / "counts.json").read_text())


def prompts(rows):
    """The first turns of curated rows or distilled samples."""
    return {row["messages"][0]["content"] for row in rows}
