"""The arguments that the commands which ask a model questions share."""

from __future__ import annotations

from fastmtp.cli import InputError, Parser


def add_arguments(p: Parser) -> None:
    """What `run` and `lossless` share."""
    p.add_argument(
        "--model", required=True, metavar="FOLDER", help="exported model, or its ORG/NAME on a hub"
    )
    p.add_argument("--vanilla-model", metavar="FOLDER", help="the same model with the head before training")
    p.add_argument(
        "--arms",
        default="baseline,fastmtp:3",
        help="baseline, vanilla:K, fastmtp:K, +MAP, @treeTOPKxNODES, @sampled, @adaptive "
        "(default %(default)s)",
    )
    p.add_argument(
        "--token-map",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="names a map for the arms; repeatable",
    )
    p.add_argument("--tasks", default="all", help="all, or names separated by commas (default %(default)s)")
    p.add_argument("--question-folder", metavar="FOLDER", help="local TASK*.jsonl files instead of the Hub")
    p.add_argument("--num-questions", type=int, default=80, help="per task (default %(default)s)")
    p.add_argument(
        "--max-gen-length", type=int, default=1024, help="tokens an answer may have (default %(default)s)"
    )
    p.add_argument("--temperature", type=float, default=0.0, help="above 0: sample (default %(default)g)")
    p.add_argument("--top-k", type=int, default=0, help="sample from this many likeliest tokens; 0: all")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from this share (default %(default)g)")
    p.add_argument("--seed", type=int, default=0, help="of sampling, if the temperature is above 0")
    p.add_argument("--parallel", type=int, default=1, help="requests in flight; speed-ups are defined at 1")
    p.add_argument("--at-once", type=int, default=1, help="servers started side by side and asked in turns")
    p.add_argument(
        "--gpus",
        type=int,
        default=1,
        help="spread the arms over this many GPUs, one server a card (default %(default)s)",
    )
    p.add_argument(
        "--backend",
        "--engine",
        choices=("sglang", "vllm", "reference"),
        default="sglang",
        help="who answers: an engine's server, or our decoder in this process (default %(default)s)",
    )
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default bfloat16 on an engine, float32 on reference"
    )
    p.add_argument("--device", default="cpu", help="of the reference backend (default %(default)s)")
    p.add_argument("--port", type=int, default=30000)
    p.add_argument("--timeout", type=float, default=600.0, help="seconds one request may take")
    p.add_argument("--out", required=True, metavar="FOLDER", help="answers, results.jsonl, table.md, charts")


def levels(text: str) -> list[int]:
    """ "1,8,32" -> [1, 8, 32]; "" -> []. Raises InputError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise InputError(f"--streams {text}: expected numbers of requests at a time, such as 1,8,32,64")
    return sorted({int(part) for part in parts})
