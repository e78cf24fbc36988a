"""Will this folder work, and if not, why? One page about a model folder, and about a server if there is one.

Every line is ok, a warning or an error, and says what to do. It reads any folder with a config.json, also one
that FastMTP did not write. Exit code 0: no errors; 1: errors; 2: not a model folder.

    python -m fastmtp.doctor models/smollm2-fastmtp --data data/heldout.jsonl
    python -m fastmtp.doctor --budget 1.5B 7B --gpu h200     # what drafting and training would cost there
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from fastmtp import hub
from fastmtp.budget import page as budget
from fastmtp.budget.cards import CARDS, card_of
from fastmtp.budget.shapes import SIZES
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.formats.weights import headers
from fastmtp.health.folder import ERROR, Folder, Line
from fastmtp.health.running import server
from fastmtp.health.serving import engines, expected
from fastmtp.health.tensors import architecture, biases, head, output_matrix, quantisation, tensors
from fastmtp.health.tokens import tokenizer
from fastmtp.inputs import existing, read_json


def lines(name: str, check: Callable[..., Iterator[Line]], *arguments) -> list[Line]:
    """A check's lines. What it stumbles over is an error line, so the page is always whole."""
    result = []
    try:
        for line in check(*arguments):
            result.append(line)
    except InputError as error:
        result.append(Line(name, ERROR, str(error)))
    except Exception as error:  # a foreign folder may hold anything
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        result.append(Line(name, ERROR, f"cannot be checked ({type(error).__name__}: {reason})"))
    return result


def examine(args: argparse.Namespace) -> list[Line]:
    path = hub.model(args.folder)
    folder = Folder(path, read_json(path / "config.json"), {})
    page = lines("architecture", architecture, folder)
    try:
        folder.entries = headers(path)
    except InputError as error:
        page.append(Line("tensors", ERROR, str(error)))
    if folder.entries:
        for check in (quantisation, tensors, output_matrix, biases, head):
            page += lines(check.__name__.replace("_", " "), check, folder)
    page += lines("tokenizer", tokenizer, folder)
    page += lines("SGLang", engines, folder)
    if args.data:
        existing(args.data)
        page += lines("accept length", expected, folder, args.data, args.limit, args.num_steps)
    if args.server:
        page += lines("server", server, folder, args.server)
    return page


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.doctor",
        "Say whether a model folder will work, and why not. Exit code 0: no errors; 1: errors; 2: bad input.",
        "python -m fastmtp.doctor models/smollm2-fastmtp --data data/heldout.jsonl",
    )
    p.add_argument("folder", nargs="?", help="model folder, ours or another's, or ORG/NAME on a hub")
    p.add_argument(
        "--data",
        help="distilled samples: also measure the accept length, with both states that a head may expect",
    )
    p.add_argument("--limit", type=int, default=8, help="samples of --data to use (default 8)")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle, K (default 3)")
    p.add_argument("--server", help="URL of a running server: does it serve this folder, and does it draft?")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument(
        "--budget",
        nargs="+",
        metavar="MODEL",
        help="instead of checks: bytes, times and the tau that pays; for models (folders, "
        f"config.json files, ORG/NAME on a hub) or {', '.join(SIZES)}",
    )
    p.add_argument("--gpu", metavar="CARD", help=f"card of --budget: {', '.join(CARDS)}")
    p.add_argument(
        "--tau", nargs="+", type=float, default=[1.5, 2.0, 2.5, 3.0], help="accept lengths of --budget"
    )
    return p


def print_budget(args: argparse.Namespace) -> None:
    """InputError for an unknown model or card."""
    if args.folder or args.data or args.server:
        raise InputError("--budget checks no folder and no server; leave FOLDER, --data and --server out")
    if not args.gpu:
        raise InputError(f"--budget needs --gpu CARD, one of {', '.join(CARDS)}")
    if not all(1 <= tau < 100 for tau in args.tau):
        raise InputError("--tau must be accept lengths from 1 on")
    card = card_of(args.gpu)
    columns = [budget.budget(model, card, args.tau) for model in args.budget]
    lines = budget.basis(card)
    if args.json:
        print(json.dumps({"gpu": card.name, "models": columns, "basis": lines}, indent=2))
    else:
        print(budget.table(card, columns), "", *lines, sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least(args, 1, "limit", "num_steps")
    if args.budget:
        return print_budget(args)
    if not args.folder or args.gpu:
        raise InputError("give a model folder to check, or --budget MODEL --gpu CARD")
    page = examine(args)
    if args.json:
        print(json.dumps([asdict(line) for line in page], indent=2, ensure_ascii=False))
    else:
        for line in page:
            print(f"{line.level:<8} {line.name:<14} {line.text}" + (f"; {line.cure}" if line.cure else ""))
    if any(line.level == ERROR for line in page):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
