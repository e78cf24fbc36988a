"""Calls of `fastmtp.distill` in a folder of its own."""

import json
from pathlib import Path

from helpers.stand_in import StandIn

from fastmtp import distill


def ask(*prompts: str | dict) -> None:
    rows = [p if isinstance(p, dict) else {"prompt": p} for p in prompts]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*words: str, server: StandIn | None = None) -> None:
    urls = ["--server", server.url] if server else []
    line = "--model model --prompts prompts.jsonl --max-new-tokens 64 --out out.jsonl"
    distill.main([*line.split(), *urls, *words])


def lines(path: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def asked(row: dict) -> str:
    return row["messages"][0]["content"]
