"""Starts SGLang with the head as its draft model, waits until it answers, and stops it on Ctrl-C.

    python -m fastmtp.serve --model models/smollm2-fastmtp --num-steps 3 --token-map vocab/smollm2/en_32k.pt
    python -m fastmtp.serve --model models/mimo-7b-fastmtp --token-maps en=vocab/qwen2/en_32k.pt,zh=vocab/qwen2/zh_32k.pt

The command line is built for the SGLang that is installed (0.5.17 or later), printed, and run as a process of
its own. Flags after `--` go to SGLang as they are and override what is chosen here.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from pathlib import Path

from fastmtp.cli import InputError, Parser, run
from fastmtp.engines.process import Server, ServerError
from fastmtp.engines.sglang import (
    VOCAB_READY,
    check_token_map,
    command,
    sglang_version,
    split_flags,
    vocab_environment,
)


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.serve",
        "Serve an exported model with SGLang and its MTP head as the draft. Flags after -- go to SGLang.",
        "python -m fastmtp.serve --model models/smollm2-fastmtp --num-steps 3 --port 30000 -- --mem-fraction-static 0.7",
    )
    p.add_argument("--model", required=True, metavar="FOLDER", help="folder written by fastmtp.export")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle (default %(default)s)")
    p.add_argument("--token-map", metavar="PATH", help="draft vocabulary, from fastmtp.build_vocab")
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
    p.add_argument("--port", type=int, default=30000, help="default %(default)s")
    p.add_argument("--dry-run", action="store_true", help="print SGLang's command line and stop")
    return p


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_flags(argv)
    args = parser().parse_args(ours)
    if args.num_steps < 1:
        raise InputError(
            f"--num-steps {args.num_steps}: must be at least 1; for plain decoding give --no-spec"
        )
    if args.tp < 1:
        raise InputError(f"--tp {args.tp}: must be at least 1")
    if args.token_maps and (args.token_map or args.no_spec):
        raise InputError(
            f"--token-maps with {'--token-map' if args.token_map else '--no-spec'}: give one of them"
        )
    if args.vocab_policy and not args.token_maps:
        raise InputError("--vocab-policy: there are no --token-maps; give them or leave it out")
    if not 1 <= args.port <= 65535:
        raise InputError(f"--port {args.port}: must be 1 to 65535")
    line = command(
        args.model, 0 if args.no_spec else args.num_steps, args.token_map, args.tp, args.port, flags
    )
    log = Path(tempfile.gettempdir()) / f"fastmtp-serve-{args.port}.log"
    env = {}
    if args.token_map:
        check_token_map(args.token_map, args.model)
    if args.token_maps:
        file = log.with_suffix(".vocab.pt")
        env = vocab_environment(args.token_maps, args.vocab_policy or "auto", args.model, file)
    shown = shlex.join([*(f"{name}={value}" for name, value in env.items()), *line])
    if args.dry_run:
        print(shown)
        return
    print(f"SGLang {sglang_version()}: {shown}", flush=True)
    serve(line, args.port, log, env)


def serve(argv: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> None:
    """Run until Ctrl-C or the server's end. A server that dies ends us with exit code 1 and its last lines."""
    started = time.monotonic()
    print(f"starting; the log is {log}", flush=True)
    try:
        with Server(argv, port, log, env=env) as server:
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
