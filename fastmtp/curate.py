"""Distilled answers -> `train.jsonl` and `eval.jsonl` that `swift sft` loads as they are, exact token ids kept.

    python -m fastmtp.curate --input distilled.jsonl --out data/mix --eval-share 0.01
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from fastmtp.cli import InputError, Parser, run
from fastmtp.files import read_jsonl, write_jsonl, write_provenance


def training_row(sample: dict, where: str) -> dict:
    """One distilled sample in ms-swift's form; an answer is `{"token_ids": [...]}`, never text to tokenise again.

    Raises InputError, starting with `where`, when the sample does not end with an answer or its ids are missing.
    """
    messages = sample.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise InputError(f"{where}: 'messages' must end with an assistant answer; distill this file first")
    row = []
    for turn, message in enumerate(messages):
        content = message.get("content")
        if message.get("role") == "assistant":
            ids = content.get("token_ids") if isinstance(content, dict) else message.get("token_ids")
            if ids is None and turn == len(messages) - 1:
                ids = sample.get("output_ids")
            if not isinstance(ids, list):
                raise InputError(f"{where}: answer {turn} has no 'token_ids'; write it with `fastmtp distill`")
            content = {"token_ids": ids}
        row.append({"role": message.get("role"), "content": content})
    return {"messages": row}


def parser() -> Parser:
    p = Parser(
        "fastmtp curate",
        "Clean and split distilled answers into ms-swift's training files.",
        "python -m fastmtp.curate --input distilled.jsonl --out data/mix --eval-share 0.01",
    )
    p.add_argument("--input", nargs="+", required=True, help="distilled samples, .jsonl or .jsonl.gz")
    p.add_argument("--recipe", help="YAML recipe")
    p.add_argument("--out", required=True, help="folder for train.jsonl, eval.jsonl and the report")
    p.add_argument("--eval-share", type=float, default=0.0, help="share of the samples held out for eval.jsonl")
    p.add_argument("--seed", type=int, default=0)
    return p


def main(argv=None) -> None:
    args = parser().parse_args(argv)
    rows, seen, dropped = [], set(), {"empty": 0, "exact_duplicate": 0}
    for path in args.input:
        for number, sample in read_jsonl(path):
            row = training_row(sample, f"{path}:{number}")
            if not str(sample["messages"][-1].get("content") or "").strip():
                dropped["empty"] += 1
                continue
            key = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
            if key in seen:
                dropped["exact_duplicate"] += 1
                continue
            seen.add(key)
            rows.append(row)
    if not rows:
        raise InputError(f"{args.input[0]}: no sample is left to train on")
    random.Random(args.seed).shuffle(rows)
    held = round(args.eval_share * len(rows))
    out = Path(args.out)
    write_jsonl(out / "train.jsonl", rows[held:])
    write_jsonl(out / "eval.jsonl", rows[:held])
    write_provenance(out, {**vars(args), "dropped": dropped}, args.input)
    print(f"{out}: {len(rows) - held} train, {held} eval; dropped {dropped}")


if __name__ == "__main__":
    run(main)
