"""Starts SGLang or vLLM with the head as its draft model, waits until it answers, and stops it on Ctrl-C.

    python -m fastmtp.serve --model models/smollm2-fastmtp --num-steps 3 --token-map vocab/smollm2/en_32k.pt
    python -m fastmtp.serve --model models/mimo-7b-fastmtp --token-maps en=EN_32K.pt,zh=ZH_32K.pt
    python -m fastmtp.serve --model models/smollm2-fastmtp --tree 4,3,16
    python -m fastmtp.serve --model models/mimo-7b-fastmtp --plan plan.json
    python -m fastmtp.serve --model models/smollm2-fastmtp --engine vllm

The command line is built for the engine that is installed (SGLang 0.5.17 or later; vLLM 0.25.1 or later, its
CPU build too), printed, and run as a process of its own. Flags after `--` go to the engine and override what
is chosen here, unless they contradict the options or cannot work. The log is in a
folder of its own that only this user can read.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastmtp import hub
from fastmtp.checkpoint import CONTRACT_KEY
from fastmtp.cli import InputError, Parser, at_least, run, split_at_dashes
from fastmtp.engines import vllm
from fastmtp.engines.address import HOST
from fastmtp.engines.process import Server, ServerError
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang import (
    ADAPTIVE_STEPS,
    VOCAB_READY,
    command,
    sglang_version,
    tree_environment,
    vocab_environment,
)
from fastmtp.engines.sglang_flags import canonical, merged
from fastmtp.inputs import read_json, shipped
from fastmtp.planning.plan_file import Plan, read_plan, write_steps
from fastmtp.trees.tree import DynamicTree
from fastmtp.trees.tree_file import parse

KEY = "FASTMTP_API_KEY"


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.serve",
        "Serve an exported model with its MTP head as the draft. Flags after -- go to the engine.",
        "python -m fastmtp.serve --model models/smollm2-fastmtp --port 30000 -- --mem-fraction-static 0.7",
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="written by fastmtp.export, or such a folder's ORG/NAME",
    )
    p.add_argument(
        "--engine",
        choices=("sglang", "vllm"),
        help="default: the one that is installed; SGLang if both are",
    )
    p.add_argument("--num-steps", type=int, help="drafts per cycle (default 3, or the depth of --tree)")
    p.add_argument(
        "--tree",
        metavar="TOPK,DEPTH,NODES",
        help="verify a tree instead of a chain: NODES tokens per cycle, the newest included (SGLang only)",
    )
    p.add_argument(
        "--adaptive",
        action="store_true",
        help="let SGLang change the number of steps with the load and what is accepted (chains only)",
    )
    p.add_argument(
        "--token-map", type=shipped, metavar="PATH", help="draft vocabulary, a .pt file here or on a hub"
    )
    p.add_argument(
        "--token-maps",
        metavar="EN=PATH,ZH=PATH",
        help="a map for each language; the draft follows the requests' languages (SGLang only)",
    )
    p.add_argument(
        "--vocab-policy",
        metavar="auto|fixed:NAME|union",
        help="which of --token-maps is used when (default auto)",
    )
    p.add_argument(
        "--plan",
        metavar="FILE",
        help="serve with the steps, tree and map that fastmtp.plan chose; with --adaptive its steps for each "
        "number of requests (SGLang only)",
    )
    p.add_argument("--no-spec", action="store_true", help="plain decoding, the baseline")
    p.add_argument("--tp", type=int, default=1, help="GPUs to split the model over (default %(default)s)")
    p.add_argument("--host", default=HOST, help="address to listen on, IPv4 or IPv6 (default %(default)s)")
    p.add_argument("--port", type=int, default=30000, help="default %(default)s")
    p.add_argument(
        "--api-key", help=f"what clients must send; never printed (default: the environment's {KEY}, if set)"
    )
    p.add_argument("--dry-run", action="store_true", help="print the engine's command line and stop")
    return p


@dataclass
class Start:
    """How a server is started. ready: lines in its log without which our extension is not in use."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    ready: list[str] = field(default_factory=list)

    def shown(self, key: str | None) -> str:
        """The command line as a shell takes it, without the key."""
        variables = [f"{name}={value}" for name, value in self.env.items()]
        return shlex.join([*variables, *self.argv, *(["--api-key=***"] if key else [])])


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_at_dashes(argv)
    args = parser().parse_args(ours)
    engine = args.engine or default_engine()
    plan = take_plan(args, engine) if args.plan else None
    serving = serving_of(args, merged(plan.flags, canonical(flags)) if plan else flags)
    # Of this user and this run alone: two servers, or another user's link, never meet here.
    needed = not args.dry_run or args.token_maps or (plan and plan.steps)
    folder = Path(tempfile.mkdtemp(prefix="fastmtp-serve-")) if needed else None
    if plan and plan.steps:
        serving = replace(serving, table=str(write_steps(plan, folder / "steps.json")))
    start = start_vllm(args, serving) if engine == "vllm" else start_sglang(args, serving, folder)
    start.env |= plan.environment if plan else {}
    key = args.api_key or os.environ.get(KEY) or None
    if args.dry_run:
        print(start.shown(key))
        return
    print(f"{start.name}: {start.shown(key)}", flush=True)
    line = start.argv + ([f"--api-key={key}"] if key else [])
    serve(line, args.port, folder / "server.log", start.env, args.host, key, start.ready)


def take_plan(args, engine: str) -> Plan:
    """The plan of --plan, whose choice takes the place of the options that say the same. Says what it chose.

    Raises InputError for a plan made for something else, or beside options that contradict it.
    """
    rivals = ("num_steps", "tree", "token_map", "token_maps", "no_spec")
    if given := [name for name in rivals if getattr(args, name) not in (None, False)]:
        raise InputError(f"--plan with --{given[0].replace('_', '-')}: the plan says this; leave one out")
    if engine == "vllm":
        raise InputError("--plan: it was made from SGLang's costs; leave it out, or serve with SGLang")
    args.model = str(hub.model(args.model))
    plan = read_plan(args.plan, args.model, args.adaptive)
    args.token_map, args.num_steps = plan.token_map, plan.num_steps
    args.tree = plan.tree and f"{plan.tree.topk},{plan.tree.depth},{plan.tree.nodes}"
    print(f"plan: {plan.text}", file=sys.stderr)
    return plan


def serving_of(args, flags: list[str]) -> Serving:
    """What the options ask for. Raises InputError for options that contradict each other."""
    tree = parse(args.tree) if args.tree else None
    if tree and not isinstance(tree, DynamicTree):
        raise InputError(f"--tree {args.tree}: SGLang draws its trees while it runs; give TOPK,DEPTH,NODES")
    default = tree.depth if tree else ADAPTIVE_STEPS if args.adaptive else 3
    steps = default if args.num_steps is None else args.num_steps
    check_arguments(args, steps)
    args.model = str(hub.model(args.model))
    args.token_map = hub.token_map(args.token_map) if args.token_map else None
    return Serving(
        model=args.model,
        num_steps=0 if args.no_spec else steps,
        token_map=args.token_map,
        token_maps=args.token_maps,
        tree=tree,
        adaptive=args.adaptive,
        tp=args.tp,
        host=args.host,
        port=args.port,
        flags=flags,
    )


def default_engine() -> str:
    """The engine that is installed; SGLang if both are, or none."""
    if importlib.util.find_spec("sglang") is None and vllm.find_python():
        return "vllm"
    return "sglang"


def start_sglang(args, serving: Serving, folder: Path | None) -> Start:
    """SGLang's start. `folder` takes the file of --token-maps. Raises InputError for what cannot work."""
    line = command(serving)
    name = "SGLang" if args.dry_run else f"SGLang {sglang_version()}"
    env = tree_environment(serving.tree)
    if not args.token_maps:
        return Start(name, line, env)
    env |= vocab_environment(args.token_maps, args.vocab_policy or "auto", args.model, folder / "vocab.pt")
    # SGLang passes over a model package that it cannot import, and drafts from the whole vocabulary.
    return Start(name, line, env, [VOCAB_READY])


def start_vllm(args, serving: Serving) -> Start:
    """vLLM's start. Raises InputError for what cannot work."""
    engine = vllm.installed() if vllm.find_python() or not args.dry_run else None
    line = vllm.command(serving, engine)
    config = read_json(Path(args.model) / "config.json")
    if serving.num_steps and CONTRACT_KEY not in config:
        print(
            f"fastmtp.serve: warning: {args.model}/config.json does not say what its head was trained on; "
            "vLLM gives it the state before the final norm; if the head is ours, export the folder again",
            file=sys.stderr,
        )
    name = f"vLLM {engine.version}{' (CPU)' if engine.cpu else ''}" if engine else "vLLM"
    ready = vllm.ready_lines(config, serving.num_steps, args.token_map)
    return Start(name, line, vllm.environment(engine, args.model, args.tp), ready)


def check_arguments(args, num_steps: int) -> None:
    """InputError for options that contradict each other; `command` checks them against the engine."""
    if num_steps < 1:
        raise InputError(f"--num-steps {num_steps}: must be at least 1; for plain decoding give --no-spec")
    at_least(args, 1, "tp")
    if args.no_spec and (args.tree or args.adaptive):
        name = "--tree" if args.tree else "--adaptive"
        raise InputError(f"{name} with --no-spec: plain decoding has no drafts; leave one out")
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
    ready: list[str] = (),
) -> None:
    """Run until Ctrl-C or the server's end. A server that dies ends us with exit code 1 and its last lines.

    ready: lines that the log must hold once the server answers.
    """
    started = time.monotonic()
    print(f"starting; the log is {log}", flush=True)
    try:
        with Server(argv, port, log, env=env, host=host, secret=secret) as server:
            server.require(ready)
            print(
                f"{server.url} answers after {time.monotonic() - started:.0f} s; Ctrl-C stops it", flush=True
            )
            server.process.wait()
            raise server.death()
    except ServerError as error:
        sys.exit(f"fastmtp.serve: error: {error}")
    except KeyboardInterrupt:
        print("stopped", flush=True)


if __name__ == "__main__":
    run(main)
