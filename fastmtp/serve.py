"""Starts SGLang with the head as its draft model, waits until it answers, and stops it on Ctrl-C.

    python -m fastmtp.serve --model models/smollm2-fastmtp --num-steps 3 --token-map vocab/smollm2/en_32k.pt
    python -m fastmtp.serve --model models/mimo-7b-fastmtp --token-maps en=vocab/qwen2/en_32k.pt,zh=vocab/qwen2/zh_32k.pt

The command line is built for the SGLang that is installed (0.5.17 or later), printed, and run as a process of
its own. Flags after `--` go to SGLang and override what is chosen here, except where they contradict the
options or cannot work. The log lies in a folder of its own that only this user can read.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.engines.address import HOST
from fastmtp.engines.process import Server, ServerError
from fastmtp.engines.sglang import VOCAB_READY, command, sglang_version, vocab_environment
from fastmtp.engines.sglang_flags import split_flags
from fastmtp.files import shipped

KEY = "FASTMTP_API_KEY"


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.serve",
        "Serve an exported model with SGLang and its MTP head as the draft. Flags after -- go to SGLang.",
        "python -m fastmtp.serve --model models/smollm2-fastmtp --num-steps 3 --port 30000 -- --mem-fraction-static 0.7",
    )
    p.add_argument("--model", required=True, metavar="FOLDER", help="folder written by fastmtp.export")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle (default %(default)s)")
    p.add_argument(
        "--token-map", type=shipped, metavar="PATH", help="draft vocabulary, from fastmtp.build_vocab"
    )
    p.add_argument(
        "--token-maps",
        metavar="EN=PATH,ZH=PATH",
        help="a map for each language; the draft follows the requests' languages",
    )
    p.add_argument(
        "--vocab-policy",
        metavar="auto|fixed:NAME|union",
        help="which of --token-maps is used when (default auto)",
    )
    p.add_argument("--no-spec", action="store_true", help="plain decoding, the baseline")
    p.add_argument("--tp", type=int, default=1, help="GPUs to split the model over (default %(default)s)")
    p.add_argument("--host", default=HOST, help="address to listen on, IPv4 or IPv6 (default %(default)s)")
    p.add_argument("--port", type=int, default=30000, help="default %(default)s")
    p.add_argument(
        "--api-key", help=f"what clients must send; never printed (default: the environment's {KEY}, if set)"
    )
    p.add_argument("--dry-run", action="store_true", help="print SGLang's command line and stop")
    return p


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_flags(argv)
    args = parser().parse_args(ours)
    check_arguments(args)
    steps = 0 if args.no_spec else args.num_steps
    line = command(
        args.model, steps, args.token_map, args.tp, args.port, flags, None, args.host, args.token_maps
    )
    # Of this user and this run alone: two servers, or another user's link, never meet here.
    folder = None if args.dry_run and not args.token_maps else Path(tempfile.mkdtemp(prefix="fastmtp-serve-"))
    env = {}
    if args.token_maps:
        env = vocab_environment(args.token_maps, args.vocab_policy or "auto", args.model, folder / "vocab.pt")
    key = args.api_key or os.environ.get(KEY) or None
    shown = [*(f"{name}={value}" for name, value in env.items()), *line, *(["--api-key=***"] if key else [])]
    if args.dry_run:
        print(shlex.join(shown))
        return
    print(f"SGLang {sglang_version()}: {shlex.join(shown)}", flush=True)
    line += [f"--api-key={key}"] if key else []
    serve(line, args.port, folder / "server.log", env, args.host, key)


def check_arguments(args) -> None:
    """InputError for options that contradict each other. What SGLang makes of them is checked by `command`."""
    if args.num_steps < 1:
        raise InputError(
            f"--num-steps {args.num_steps}: must be at least 1; for plain decoding give --no-spec"
        )
    at_least(args, 1, "tp")
    if args.token_maps and args.token_map:
        raise InputError("--token-maps with --token-map: give one of them")
    if args.vocab_policy and not args.token_maps:
        raise InputError("--vocab-policy: there are no --token-maps; give them or leave it out")
    if args.api_key == "":
        raise InputError("--api-key: is empty; give a key, or leave it out")


def serve(
    argv: list[str],
    port: int,
    log: Path,
    env: dict[str, str] | None = None,
    host: str = HOST,
    secret: str | None = None,
) -> None:
    """Run until Ctrl-C or the server's end. A server that dies ends us with exit code 1 and its last lines."""
    started = time.monotonic()
    print(f"starting; the log is {log}", flush=True)
    try:
        with Server(argv, port, log, env=env, host=host, secret=secret) as server:
            if env and VOCAB_READY not in log.read_text(encoding="utf-8", errors="replace"):
                # SGLang passes over a model package that it cannot import, and drafts from the whole
                # vocabulary.
                raise ServerError(f"SGLang does not use fastmtp.sglang_ext; {log} says why")
            print(
                f"{server.url} answers after {time.monotonic() - started:.0f} s; Ctrl-C stops it", flush=True
            )
            code = server.process.wait()
            raise ServerError(f"the server ended with exit code {code}{server.tail()}")
    except ServerError as error:
        sys.exit(f"fastmtp.serve: error: {error}")
    except KeyboardInterrupt:
        print("stopped", flush=True)


if __name__ == "__main__":
    run(main)
