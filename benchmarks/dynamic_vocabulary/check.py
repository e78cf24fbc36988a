"""Does a draft vocabulary that follows the language change the text, or draft outside its map? On a running
SGLang.

    python -m benchmarks.dynamic_vocabulary.check --model models/smollm2-fastmtp \\
        --token-maps en=en_16k.pt,zh=zh_16k.pt \\
        --prompts en.jsonl.gz zh.jsonl.gz --out results/vocab_check

Three servers in float32: with the following vocabulary (which stops at a draft outside the active map), with
the whole head, and plain. Prompts of the files in turn, one at a time and eight at once, as they are, asking
for another language's map, and for a language that no map has. Every greedy output must be plain decoding's.
Exit code 1 if not.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tqdm import tqdm

from evaluation import metrics
from evaluation.backends import BackendError, Server, Turn
from evaluation.metrics import first_difference
from fastmtp.chat import prompt_ids
from fastmtp.cli import InputError, Parser, at_least, run
from fastmtp.data.prompts import read_prompts
from fastmtp.engines import process, sglang
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang_flags import FLOAT32, FLOAT32_ENVIRONMENT, MEASURED, merged, split_flags, streams
from fastmtp.files import claim, write_json, write_jsonl, write_provenance
from fastmtp.tokenizer import load_tokenizer
from fastmtp.vocab import draft_vocab

FLAGS = ["--dtype", "float32", *FLOAT32, "--mem-fraction-static", "0.8", "--max-total-tokens", "32768"]
FLAGS += [*streams(8), *MEASURED]
UNKNOWN = "klingon"


async def ask_all(
    url: str, prompts: list[list[int]], tokens: int, at_once: int, params: list[dict | None]
) -> list[Turn]:
    """Greedy answers to every prompt, `at_once` in flight, with each one's custom_params."""
    gate = asyncio.Semaphore(at_once)
    with tqdm(total=len(prompts), desc=url, unit="q", disable=None, leave=False) as bar:
        async with Server(url, 300) as server:

            async def one(ids: list[int], custom: dict | None) -> Turn:
                async with gate:
                    turn = await server.ask(ids, tokens, custom_params=custom)
                bar.update()
                return turn

            return await asyncio.gather(*map(one, prompts, params))


async def ask_everything(
    urls: dict[str, str], prompts: list[list[int]], tokens: int, langs: list[str]
) -> dict[str, list[Turn]]:
    """{"server way": answers}, the servers side by side, the ways one after the other."""
    nothing = [None] * len(prompts)
    ways = {"one at a time": (1, nothing), "eight at once": (8, nothing)}
    asked = ways | {
        "asking for a map, eight at once": (
            8,
            [{"draft_lang": langs[i % len(langs)]} for i in range(len(prompts))],
        ),
        "asking for the other map": (
            1,
            [{"draft_lang": langs[(i + 1) % len(langs)]} for i in range(len(prompts))],
        ),
        "asking for an unknown language": (8, [{"draft_lang": UNKNOWN}] * len(prompts)),
    }

    async def all_ways(name: str) -> dict[str, list[Turn]]:
        answers = {}
        for way, (at_once, params) in (asked if name == "dynamic" else ways).items():
            answers[f"{name}, {way}"] = await ask_all(urls[name], prompts, tokens, at_once, params)
        return answers

    parts = await asyncio.gather(*map(all_ways, urls))
    return {key: turns for part in parts for key, turns in part.items()}


def report(found: dict[str, list[Turn]], langs: list[str], log: str) -> dict:
    """Every way against plain decoding one at a time, its accept length by language; what the dynamic
    server's log says.
    """
    plain = found["plain, one at a time"]
    rows = {}
    for way, turns in found.items():
        firsts = [first_difference(a.output_ids, b.output_ids) for a, b in zip(plain, turns, strict=True)]
        differ = [{"prompt": i, "position": at} for i, at in enumerate(firsts) if at is not None]
        rows[way] = {"prompts": len(turns), "identical": len(turns) - len(differ), "differences": differ}
        if all(turn.verify_passes is not None for turn in turns):
            by_lang = {lang: [vars(turn) for turn in turns[i :: len(langs)]] for i, lang in enumerate(langs)}
            rows[way]["accept_length"] = {
                lang: metrics.accept_length([{"turns": part}]) for lang, part in by_lang.items()
            }
    lines = [line for line in log.splitlines() if "draft vocabulary" in line]
    return {
        "ways": rows,
        "outside_the_map": log.count("is outside the map"),
        "warnings_for_the_unknown_language": sum(UNKNOWN in line for line in lines),
        "log": lines[:3] + lines[-3:],
    }


def samples(prompts: list[list[int]], turns: list[Turn], langs: list[str]) -> list[dict]:
    """Prompts and plain answers as fastmtp.acceptance reads them, so that served accept lengths can be
    compared with its own.
    """
    pairs = zip(prompts, turns, strict=True)
    return [
        {"lang": langs[i % len(langs)], "prompt_ids": ids, "output_ids": turn.output_ids}
        for i, (ids, turn) in enumerate(pairs)
    ]


def line(args, name: str, steps: int, port: int, flags: list[str]) -> list[str]:
    """One server's command line; maps are checked with the server that follows them."""
    maps = args.token_maps if name == "dynamic" else None
    return sglang.command(Serving(args.model, steps, token_maps=maps, tp=args.tp, port=port, flags=flags))


def show(result: dict) -> None:
    """Print each way's identical outputs and accept lengths, and the end of the dynamic server's log."""
    for way, row in result["ways"].items():
        taus = ", ".join(f"tau {lang} {tau:.3f}" for lang, tau in row.get("accept_length", {}).items() if tau)
        print(
            f"{way}: {row['identical']} of {row['prompts']} outputs are plain decoding's"
            + (f"; {taus}" if taus else "")
        )
    print(f"warnings for the unknown language: {result['warnings_for_the_unknown_language']}")
    print("\n".join(result["log"]))


def parser() -> Parser:
    p = Parser(
        "python -m benchmarks.dynamic_vocabulary.check",
        "Greedy outputs with a following draft vocabulary against the whole head's and plain ones. Flags "
        "after -- go to SGLang.",
        "python -m benchmarks.dynamic_vocabulary.check --model models/smollm2-fastmtp --token-maps "
        "en=en_16k.pt,zh=zh_16k.pt \\\n"
        "    --prompts general_en.jsonl.gz general_zh.jsonl.gz --out results/vocab_check",
    )
    p.add_argument("--model", required=True, metavar="FOLDER")
    p.add_argument(
        "--token-maps",
        required=True,
        metavar="EN=PATH,ZH=PATH",
        help="one map for each file of --prompts, in order",
    )
    p.add_argument("--prompts", required=True, nargs="+", help="one jsonl file a language")
    p.add_argument("--limit", type=int, default=8, help="prompts of each file (default %(default)s)")
    p.add_argument("--tokens", type=int, default=48, help="longest answer (default %(default)s)")
    p.add_argument("--num-steps", type=int, default=3, help="drafts per cycle (default %(default)s)")
    p.add_argument("--tp", type=int, default=1, help="GPUs to split each model over (default %(default)s)")
    p.add_argument("--port", type=int, default=30300, help="the first of three (default %(default)s)")
    p.add_argument("--out", required=True, metavar="FOLDER")
    return p


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_flags(argv)
    args = parser().parse_args(ours)
    at_least(args, 1, "limit", "tokens", "num_steps", "tp")
    langs = [name for name in draft_vocab.parse_maps(args.token_maps) if name != draft_vocab.MIXED]
    if len(langs) != len(args.prompts):
        raise InputError(
            f"--prompts: {len(args.prompts)} files for {len(langs)} maps; give one for each, in order"
        )
    sglang.sglang_version()
    out = Path(args.out)
    claim(out, folder=True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.model)
    rows = [read_prompts(path, limit=args.limit) for path in args.prompts]
    prompts = [prompt_ids(tokenizer, row["messages"]) for turn in zip(*rows, strict=False) for row in turn]
    env = sglang.vocab_environment(args.token_maps, "auto", args.model, out / "vocab.pt")
    env |= {"FASTMTP_CHECK_DRAFTS": "1"}
    flags = merged(FLAGS, flags)
    servers = {
        name: process.Server(
            line(args, name, steps, args.port + i, flags),
            args.port + i,
            out / f"{name}.log",
            env=FLOAT32_ENVIRONMENT | (env if name == "dynamic" else {}),
        )
        for i, (name, steps) in enumerate(
            (("dynamic", args.num_steps), ("full", args.num_steps), ("plain", 0))
        )
    }
    try:
        with process.together(list(servers.values())) as outcomes:
            for failed in filter(None, outcomes):
                raise failed
            urls = {name: server.url for name, server in servers.items()}
            found = asyncio.run(ask_everything(urls, prompts, args.tokens, langs))
            log = servers["dynamic"].log.read_text(encoding="utf-8", errors="replace")
    except (BackendError, process.ServerError) as error:
        sys.exit(f"benchmarks.dynamic_vocabulary.check: error: {error}")
    if sglang.VOCAB_READY not in log:
        sys.exit(
            f"benchmarks.dynamic_vocabulary.check: error: SGLang does not use fastmtp.sglang_ext; "
            f"{out}/dynamic.log says why"
        )
    result = report(found, langs, log)
    write_json(
        out / "check.json",
        result | {"outputs": {way: [turn.output_ids for turn in turns] for way, turns in found.items()}},
    )
    write_jsonl(out / "samples.jsonl", samples(prompts, found["plain, one at a time"], langs))
    write_provenance(out, vars(args) | {"sglang_flags": flags}, args.prompts)
    show(result)
    if result["outside_the_map"] or any(row["differences"] for row in result["ways"].values()):
        sys.exit(
            f"benchmarks.dynamic_vocabulary.check: outputs differ or drafts were outside their map; see "
            f"{out}/check.json"
        )


if __name__ == "__main__":
    run(main)
