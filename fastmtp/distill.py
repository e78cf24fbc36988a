"""The frozen model answers every prompt itself: the training set of FastMTP (arXiv 2509.18362,
self-distillation).

In this process, on servers that run already (SGLang or OpenAI-compatible), or on SGLang engines started for
the run. Token ids are kept exactly, every answer of a chat is redone in order, and a killed run continues
with the same command: answers are kept by what was asked, so prompts that were answered before are not asked
again.

    python -m fastmtp.distill --model models/smollm2 --prompts examples/prompts.jsonl --out distilled.jsonl
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastmtp import files, fingerprint, hub
from fastmtp.cli import InputError, Parser, at_least, run, split_at_dashes
from fastmtp.data.journal import Journal
from fastmtp.data.prompts import Chat, chats, file_rows, limited, listed_rows
from fastmtp.data.rendering import check_template
from fastmtp.data.sources import DataConfig, Sampling, load_samplings
from fastmtp.engines.address import api_key, is_url
from fastmtp.engines.process import ServerError
from fastmtp.engines.sglang import check_flags
from fastmtp.engines.sglang_flags import canonical
from fastmtp.formats.yaml_file import load_yaml
from fastmtp.inputs import shipped
from fastmtp.show.progress import Bar


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.distill",
        "Let the model answer every prompt and keep the exact token ids. Flags after -- go to SGLang.",
        "python -m fastmtp.distill --model models/smollm2 --prompts examples/prompts.jsonl --split train \\\n"
        "    --max-new-tokens 128 --out data/distilled.jsonl\n"
        "python -m fastmtp.distill --model models/smollm2 --data configs/data/local.yaml --engines 2 \\\n"
        "    --in-flight 2048 --out data/distilled.jsonl",
    )
    p.add_argument(
        "--model", required=True, help="model folder, or ORG/NAME on a hub; with --server, the one served"
    )
    asked = p.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--prompts",
        nargs="+",
        type=shipped,
        help="jsonl with `messages` or `prompt`, and optionally id, source, lang",
    )
    asked.add_argument(
        "--data",
        type=shipped,
        help="data set list: sources, local or on the Hub, and their sampling (configs/data/*.yaml)",
    )
    p.add_argument("--split", help="of --prompts, use only rows whose `split` is this")
    p.add_argument(
        "--limit", type=int, help="use only N prompts: the first of --prompts, or by the shares of --data"
    )
    p.add_argument(
        "--out",
        required=True,
        help="distilled samples, jsonl; what got no answer goes to NAME.failed.jsonl beside it",
    )
    way = p.add_mutually_exclusive_group()
    way.add_argument(
        "--server", nargs="+", metavar="URL", help="ask these: SGLang, or http://.../v1 for OpenAI-compatible"
    )
    way.add_argument(
        "--engines", type=int, metavar="N", help="start N SGLang engines on the visible GPUs and ask them"
    )
    p.add_argument("--api-key", help="of --server; OPENAI_API_KEY of the environment otherwise")
    p.add_argument(
        "--in-flight", type=int, default=1024, help="chats asked of servers at a time (default %(default)s)"
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=1800.0,
        help="seconds for one answer of a server (default %(default)g)",
    )
    p.add_argument(
        "--batch-size", type=int, default=32, help="without servers: prompts generated together (default 32)"
    )
    add_sampling(p)
    p.add_argument(
        "--seed", type=int, default=0, help="another one asks again; servers draw with their own (default 0)"
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="without --server")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="without servers")
    return p


def add_sampling(p: Parser) -> None:
    """How answers are drawn: four numbers for all sources, or a file with other ones per source."""
    default = Sampling()
    for flag, kind, text in (
        ("max_new_tokens", int, "longest answer"),
        ("temperature", float, "0 is greedy"),
        ("top_k", int, "keep the k likeliest tokens"),
        ("top_p", float, "of those, keep this mass"),
    ):
        name = f"--{flag.replace('_', '-')}"
        p.add_argument(name, type=kind, help=f"{text} (default {getattr(default, flag)})")
    p.add_argument(
        "--sampling",
        type=shipped,
        metavar="YAML",
        help="source -> these four, for sources that want their own",
    )


class Questions:
    """What the arguments ask: `chats()` streams it, `keys` are its digests; making one checks every row."""

    def __init__(self, args):
        options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
        options = {name: value for name, value in options.items() if value is not None}
        data = load_yaml(args.data, DataConfig) if args.data else None
        self.default = data.sampling.changed(options) if data else Sampling(**options)
        self.default.check("--")
        self.sampling: dict[str, Sampling] = {}
        if data:
            data.check(args.data)
            data.sampling.check(f"{args.data}: sampling.")
            self.sampling = {s.name: s.sampling.changed(options) for s in data.sources if s.sampling}
        if args.sampling:
            self.sampling |= load_samplings(args.sampling, self.default)
        self.rows = (
            listed_rows(data, args.data, args.seed, args.limit)
            if data
            else limited(file_rows(args.prompts, args.split), args.limit)
        )
        # What a server computes in is its own affair; here float32 and bfloat16 are two ways to answer.
        self.tag = f"{fingerprint.content(args.model)[:12]} {args.dtype} {args.seed}"
        self.keys = {chat.key for chat in self.chats()}
        if not self.keys:
            raise InputError(f"{args.data or args.prompts[0]}: no prompts; check the file and --split")

    def chats(self) -> Iterator[Chat]:
        return chats(self.rows, self.default, self.sampling, self.tag)


async def ask_servers(urls: list[str], args, questions: Questions, journal: Journal, bar: Bar) -> None:
    """Answer the questions on running servers."""
    from fastmtp.data.converse import converse_all
    from fastmtp.data.servers import Servers

    async with Servers(urls, args.model, args.timeout, args.api_key) as servers:
        await converse_all(questions.chats(), servers, args.in_flight, journal, bar)


def answer_all(args, questions: Questions, journal: Journal, flags: list[str]) -> None:
    """Answer what `journal` lacks, the way that the arguments say."""
    if journal.done >= questions.keys:
        return
    bar = Bar(
        total=len(questions.keys), initial=len(journal.done), desc="distill", unit="prompt", smoothing=0.05
    )
    with bar:
        if args.server:
            args.api_key = api_key(args.api_key)
            asyncio.run(ask_servers(args.server, args, questions, journal, bar))
        elif args.engines:
            from fastmtp.data.engines import engines

            logs = Path(tempfile.mkdtemp(prefix="fastmtp-engines-"))
            Bar.write(f"starting {args.engines} engines; their logs are in {logs}", file=sys.stderr)
            with engines(args.model, args.engines, args.in_flight, args.dtype, flags, logs) as urls:
                bar.unpause()
                asyncio.run(ask_servers(urls, args, questions, journal, bar))
        else:
            from fastmtp.data.generate import generate
            from fastmtp.reference.model import load

            model = load(args.model, args.dtype, args.device)
            check_template(model.tokenizer, args.model)
            bar.unpause()
            generate(model, questions.chats(), journal, args.batch_size, args.seed, bar)


def check(args, flags: list[str]) -> None:
    at_least(args, 1, "limit", "engines", "in_flight", "batch_size")
    if not args.timeout > 0:
        raise InputError(f"--timeout must be above 0, not {args.timeout:g}")
    if flags and not args.engines:
        raise InputError("flags after -- are for SGLang engines; give --engines, or leave them out")
    if args.data and args.split:
        raise InputError("--split is for --prompts; a data set list names each source's own split")
    if args.server or args.engines:
        try:
            import aiohttp  # noqa: F401
        except ImportError:
            raise InputError("--server and --engines need aiohttp; pip install -e '.[serve]'") from None
    if args.engines:
        check_flags(canonical(flags), 0, {})  # before the prompts are read and a GPU is looked for
    for url in args.server or []:
        if not is_url(url):
            raise InputError(f"--server {url}: not a URL; give one such as http://127.0.0.1:30000")


def main(argv: Sequence[str] | None = None) -> None:
    ours, flags = split_at_dashes(argv)
    args = parser().parse_args(ours)
    check(args, flags)
    args.model = str(hub.model(args.model))
    questions = Questions(args)
    try:
        files.check_apart(args.out, args.model, args.data, args.sampling, *(args.prompts or []))
        with Journal(args.out, questions.keys) as journal:
            answer_all(args, questions, journal, flags)
    except ServerError as error:
        sys.exit(f"fastmtp.distill: error: {error}; what was answered is kept, the same command continues")
    inputs = [*(args.prompts or []), *filter(None, [args.data, args.sampling])]
    config = {name: value for name, value in vars(args).items() if name != "api_key"}
    files.write_provenance(args.out, {**config, "sglang_flags": flags}, inputs)
    print(f"distilled {args.out}: {len(journal.done)} answered, {journal.tokens:,} output tokens in this run")
    if journal.failed:
        sys.exit(
            f"fastmtp.distill: {journal.failed} of {len(questions.keys)} prompts got no answer, the first: "
            f"{journal.first_reason}; {journal.failures} lists them, and the same command tries them again"
        )


if __name__ == "__main__":
    run(main)
