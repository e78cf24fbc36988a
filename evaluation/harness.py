"""One benchmark against one running server: the command line that the seven benchmarks share.

    python -m evaluation.math_500.bench_sglang_eagle --port 30000 --num-questions 80

Finished answers are kept; the same command after a kill asks only what is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from evaluation import metrics
from evaluation.answers import Answers
from evaluation.asking import Prompts, Settings, collect
from evaluation.backends import BackendError, Server
from evaluation.conditions import bench_config, check_numbers, context_of, counts, environment
from evaluation.questions import Task, load_questions
from evaluation.tasks import TASKS
from fastmtp import hub
from fastmtp.cli import InputError, Parser, run
from fastmtp.engines.address import api_key, base_url
from fastmtp.files import check_output, claim, release, write_jsonl
from fastmtp.fingerprint import differences, fingerprint, gpu_name
from fastmtp.inputs import read_jsonl
from fastmtp.tokenizer import load_tokenizer

# In these an arm may differ from its baseline: the drafts, and what SGLang sets by itself for them.
OF_DRAFTS = {"num_steps", "token map", "disable_overlap_schedule", "max_running_requests"}
OF_DRAFTS |= {"mem_fraction_static", "cuda_graph_max_bs", "cuda_graph_max_bs_decode"}


def parser(task: Task) -> Parser:
    name = f"evaluation.{task.name}.bench_sglang_eagle"
    p = Parser(
        f"python -m {name}",
        f"{task.title} against a running SGLang server: accept length and speed.",
        f"python -m {name} --num-questions 80 --port 30000 --result-file results/bench.jsonl",
    )
    p.add_argument(
        "--question-file", metavar="FILE", help=f"local .jsonl instead of {task.dataset} from the Hub"
    )
    p.add_argument("--num-questions", type=int, default=80)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--max-gen-length", type=int, default=1024, help="tokens an answer may have")
    p.add_argument(
        "--answer-file", metavar="FILE", help=f"default results/bench/{task.name}.ARM.answers.jsonl"
    )
    p.add_argument(
        "--result-file", metavar="FILE", default="results/bench/results.jsonl", help="default %(default)s"
    )
    p.add_argument("--parallel", type=int, default=1, help="requests in flight; speed-ups are defined at 1")
    p.add_argument("--host", default="http://127.0.0.1", help="name, address or URL (default %(default)s)")
    p.add_argument("--port", type=int, default=30000)
    p.add_argument("--api-key", metavar="KEY", help="of the server; default: OPENAI_API_KEY, if it is set")
    p.add_argument(
        "--model", metavar="FOLDER", help="folder of the tokenizer; default: the one the server names"
    )
    p.add_argument("--timeout", type=float, default=600.0, help="seconds one request may take")
    return p


def check_files(args: argparse.Namespace) -> None:
    """InputError if an output would replace another of the files, or something that is not ours."""
    named = {name: getattr(args, name) for name in ("question_file", "answer_file", "result_file")}
    paths = {name: Path(path).resolve() for name, path in named.items() if path}
    for first, second in (("question_file", "answer_file"), ("question_file", "result_file")) + (
        ("answer_file", "result_file"),
    ):
        if first in paths and paths[first] == paths.get(second):
            options = [f"--{name.replace('_', '-')}" for name in (first, second)]
            raise InputError(f"{named[first]}: given as {options[0]} and as {options[1]}; give two files")
    for name in ("answer_file", "result_file"):
        if named[name]:
            check_output(named[name])
    if Path(args.result_file).exists():
        for _ in read_jsonl(args.result_file):  # a torn line is found before anything is asked
            pass


def script(file: str, name: str) -> Callable[..., None]:
    """The `main` of a benchmark's script, which is named after its folder; run if it is `__main__`."""
    task = TASKS[Path(file).resolve().parent.name]
    own = functools.partial(main, task)
    if name == "__main__":
        run(own, f"evaluation.{task.name}.bench_sglang_eagle")
    return own


def main(task: Task, argv: list[str] | None = None) -> None:
    """One benchmark against one running server. A failing server ends it with exit code 1 and one line."""
    args = parser(task).parse_args(argv)
    check_numbers(args)
    url = base_url(args.host, args.port)
    check_files(args)
    questions = load_questions(task, args.question_file, args.num_questions)
    result_file = Path(args.result_file)
    claim(result_file)
    try:
        line = asyncio.run(_bench(task, args, url, questions))
        add_result(result_file, line)
    except BackendError as error:
        sys.exit(f"{task.name}: error: {error} (finished answers are kept; the same command continues)")
    finally:
        release(result_file)
    for reason in metrics.unknowns(line):
        print(f"{task.name}: warning: {reason}", file=sys.stderr)
    print(summary(line))


async def _bench(task: Task, args, url: str, questions: list[list[str]]) -> dict:
    settings = Settings(args.max_gen_length, args.temperature)
    async with Server(url, args.timeout, api_key(args.api_key)) as server:
        info = await server.info()
        num_steps, token_map, arm = arm_of(info)
        tokenizer_name = str(hub.tokenizer(args.model)) if args.model else info["tokenizer"]
        depends = identity(info, num_steps, token_map, tokenizer_name, settings, args.parallel)
        default = f"results/bench/{task.name}.{arm.replace(':', '-')}.answers.jsonl"
        answers = Answers(Path(args.answer_file or default), depends, "--answer-file")
        try:
            prompts = Prompts(load_tokenizer(tokenizer_name), task)
            context = context_of(tokenizer_name, info["all_settings"].get("context_length"))
            source = args.question_file or task.dataset
            prompts.check(questions, context, source)
            rows = await collect(server, prompts, questions, settings, answers, num_steps, args.parallel, arm)
        finally:
            answers.close()
    print(f"{task.name}: {counts(answers.asked, len(rows))}", file=sys.stderr)
    config = bench_config(task, args.question_file, questions, settings, args.parallel, depends)
    return metrics.result_line(
        rows,
        task=task.name,
        arm=arm,
        model=info["model"],
        num_steps=num_steps,
        token_map=token_map,
        temperature=args.temperature,
        config=config,
        environment=environment(info, "sglang"),
        baseline_throughput=_baseline(Path(args.result_file), task.name, config) if num_steps else None,
    )


def arm_of(info: dict) -> tuple[int, str | None, str]:
    """Draft steps, token map and the arm's name of a running server."""
    settings = info["settings"]
    num_steps = settings.get("speculative_num_steps") or 0
    if not settings.get("speculative_algorithm"):
        num_steps = 0
    token_map = info["token_map"] if num_steps else None
    if not num_steps:
        return 0, None, "baseline"
    arm = f"fastmtp:{num_steps}" + (f"+{Path(token_map).stem}" if token_map else "")
    topk = settings.get("speculative_eagle_topk") or 1
    if topk > 1:
        arm += f"@tree{topk}x{settings['speculative_num_draft_tokens']}"
    return num_steps, token_map, arm


def identity(
    info: dict, num_steps: int, token_map: str | None, tokenizer: str, settings: Settings, parallel: int
) -> dict[str, object]:
    """All that a running server's answers depend on: by content what lies on this machine, else by name."""
    named = {"model": info["model"], "tokenizer": tokenizer, "token map": token_map}
    here = {name: path for name, path in named.items() if path and Path(path).exists()}
    elsewhere = {name: path for name, path in named.items() if name not in here}
    asked = {"num_steps": num_steps, "parallel": parallel, "gpu": gpu_name(), "sglang": info["version"]}
    return fingerprint(here, elsewhere | asked | settings.facts() | info["all_settings"])


def _baseline(result_file: Path, task: str, config: dict) -> float | None:
    """Throughput of plain decoding on the same questions under the same settings, if this file has it."""
    if not result_file.exists():
        return None
    reasons = []
    for number, row in read_jsonl(result_file):
        if (row.get("task"), row.get("arm")) != (task, "baseline"):
            continue
        theirs = row.get("config") or {}
        changed = compared(theirs.get("fingerprint") or {}, config["fingerprint"])
        if (theirs.get("questions") or {}).get("digest") != config["questions"]["digest"]:
            changed.insert(0, "other questions")
        if not changed:
            return row.get("throughput")
        reasons.append(f"{result_file}:{number}: {'; '.join(changed)}")
    if reasons:
        print(f"{task}: no speed-up: the baseline differs ({reasons[-1]})", file=sys.stderr)
    return None


def compared(baseline: dict, drafting: dict) -> list[str]:
    """In what else than its drafts an arm differs from its baseline."""
    both = [
        {
            name: value
            for name, value in one.items()
            if name not in OF_DRAFTS and not name.startswith("speculative")
        }
        for one in (baseline, drafting)
    ]
    return differences(*both)


def add_result(path: Path, line: dict) -> None:
    """Append a result line, in place of an earlier one of the same task, arm, questions and settings."""

    def identity_of(row: dict) -> str:
        names = ("task", "arm", "model", "num_questions", "temperature", "config")
        return json.dumps([row.get(name) for name in names], sort_keys=True)

    rows = [row for _, row in read_jsonl(path)] if path.exists() else []
    write_jsonl(path, [row for row in rows if identity_of(row) != identity_of(line)] + [line])


def summary(line: dict) -> str:
    """One readable line of a result."""
    parts = [
        f"{line['task']} {line['arm']}: {line['num_questions']} questions, {line['output_tokens']} tokens"
    ]
    for key, form in (
        ("accept_length", "accept length {:.2f}"),
        ("throughput", "{:.1f} tok/s"),
        ("decode_throughput", "decode {:.1f} tok/s"),
        ("speedup", "{:.2f}x"),
    ):
        if line[key] is not None:
            parts.append(form.format(line[key]))
    return ", ".join(parts)
