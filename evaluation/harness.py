"""Everything the seven benchmarks share: prompts, asking, resuming, one command line.

`collect` asks a task's questions and appends one line per finished question to an answer file; the same call
after a kill asks only what is missing.

    python -m evaluation.math_500.bench_sglang_eagle --port 30000 --num-questions 80
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from evaluation import metrics
from evaluation.backends import BackendError, Server, Turn
from evaluation.questions import Task, digest, load_questions, question_keys
from fastmtp.chat import prompt_ids
from fastmtp.cli import InputError, Parser, at_least
from fastmtp.files import provenance, read_jsonl, write_jsonl

WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Settings:
    """What an answer depends on. Answers made under other settings are never mixed with these."""

    task: str
    arm: str
    model: str
    temperature: float = 0.0
    max_gen_length: int = 1024
    seed: int = 0
    dtype: str | None = None

    def digest(self) -> str:
        return digest(asdict(self))


async def collect(
    backend,
    tokenizer,
    task: Task,
    questions: list[list[str]],
    settings: Settings,
    answer_file: Path,
    num_steps: int,
    parallel: int = 1,
) -> list[dict]:
    """Answers of all questions in order; those already in `answer_file` are not asked again.

    Warm-up requests go first and are not kept; the prefix cache is emptied before the first question. Raises
    BackendError when the backend fails: what was finished stays in `answer_file`.
    """
    keys = question_keys(task, questions)
    done = read_answers(answer_file, settings)
    missing = [n for n, key in enumerate(keys) if key not in done]
    if missing:
        await _warm_up(backend, tokenizer, task, questions[missing[0]])
        await backend.flush()
        answer_file.parent.mkdir(parents=True, exist_ok=True)
        free = asyncio.Semaphore(parallel)
        bar = tqdm(
            total=len(keys),
            initial=len(keys) - len(missing),
            desc=f"{settings.arm} {task.name}",
            unit="q",
            disable=None,
        )

        async def one(number: int) -> None:
            async with free:
                turns = await _answer(backend, tokenizer, task, questions[number], settings, num_steps)
                row = {
                    "question": keys[number],
                    "settings": settings.digest(),
                    "turns": [asdict(t) for t in turns],
                }
                with open(answer_file, "a", encoding="utf-8") as out:
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                done[keys[number]] = row
                bar.update()

        waiting = [asyncio.ensure_future(one(number)) for number in _first_of_each(missing, keys)]
        try:
            await asyncio.gather(*waiting)
        finally:
            for request in waiting:
                request.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            bar.close()
    return [done[key] for key in dict.fromkeys(keys)]


def _first_of_each(numbers: list[int], keys: list[str]) -> list[int]:
    """A question that a file holds twice is asked once."""
    return list({keys[n]: n for n in reversed(numbers)}.values())[::-1]


async def _warm_up(backend, tokenizer, task: Task, question: list[str]) -> None:
    ids = prompt_ids(tokenizer, chat_messages(task, question[:1]))
    for _ in range(2):
        await backend.ask(ids, WARM_UP_TOKENS)


async def _answer(backend, tokenizer, task, question, settings: Settings, num_steps: int) -> list[Turn]:
    """All turns of one question; each turn's prompt holds the answers before it."""
    answers: list[Turn] = []
    for last in range(len(question)):
        ids = prompt_ids(tokenizer, chat_messages(task, question[: last + 1], [a.text for a in answers]))
        turn = await backend.ask(ids, settings.max_gen_length, settings.temperature, seed=settings.seed)
        answers.append(_checked(turn, num_steps))
    return answers


def chat_messages(task: Task, user: list[str], answers: list[str] = ()) -> list[dict]:
    messages = [{"role": "system", "content": task.system}] if task.system else []
    for number, text in enumerate(user):
        messages.append({"role": "user", "content": text})
        messages += [{"role": "assistant", "content": a} for a in answers[number : number + 1]]
    return messages


def _checked(turn: Turn, num_steps: int) -> Turn:
    """A turn whose accounting fits the arm. An answer of one token comes from prefill alone: nothing was
    verified.
    """
    if num_steps == 0 and turn.verify_passes is not None:
        raise BackendError("the server drafts although this arm is plain decoding; start it with --no-spec")
    if num_steps and turn.verify_passes is None:
        if len(turn.output_ids) > 1:
            raise BackendError("the server reports no verify passes; it was started without speculation")
        turn.verify_passes = 0
    if len(turn.histogram) > num_steps + 1:
        drafts = len(turn.histogram) - 1
        raise BackendError(
            f"a pass accepted {drafts} drafts in an arm of {num_steps} steps; the server's K is another"
        )
    return turn


def read_answers(path: Path, settings: Settings) -> dict[str, dict]:
    """Question key -> answer. A last line cut short by a kill is removed; foreign answers raise InputError."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)
    done = {}
    for number, row in read_jsonl(path):
        if row.get("settings") != settings.digest():
            raise InputError(
                f"{path}:{number}: made by another model, arm or setting; remove the file or name another"
            )
        done[row["question"]] = row
    return done


def environment(backend_info: dict, backend: str) -> dict:
    """Where the figures come from: engine, its settings, package versions, GPU."""
    facts = provenance({})
    versions = facts["versions"] | ({"sglang": backend_info["version"]} if backend_info["version"] else {})
    return {
        "backend": backend,
        "versions": versions,
        "git_commit": facts["git_commit"],
        "gpu": gpu_name(),
        "settings": backend_info["settings"],
        "finished": facts["finished"],
    }


def gpu_name() -> str | None:
    """Name of the first GPU, asked without making a context on it."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.splitlines()[0].strip() if found.stdout.strip() else None


def bench_config(task: Task, question_file: str | Path | None, settings: Settings, parallel: int) -> dict:
    source = (
        {"file": Path(question_file).name}
        if question_file
        else {"dataset": task.dataset, "revision": task.revision}
    )
    shared = {"max_gen_length": settings.max_gen_length, "parallel": parallel, "seed": settings.seed}
    return shared | {"questions": source, "chat_template": "model"}


def parser(task: Task) -> Parser:
    name = f"evaluation.{task.name}.bench_sglang_eagle"
    example = f"python -m {name} --num-questions 80 --port 30000 --result-file results/bench.jsonl"
    p = Parser(
        f"python -m {name}",
        f"{task.title} against a running SGLang server: accept length and speed.",
        example,
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
    p.add_argument("--host", default="http://127.0.0.1")
    p.add_argument("--port", type=int, default=30000)
    p.add_argument(
        "--model", metavar="FOLDER", help="folder of the tokenizer; default: the one the server names"
    )
    p.add_argument("--timeout", type=float, default=600.0, help="seconds one request may take")
    return p


def check_counts(args) -> None:
    """Positive counts, or InputError."""
    at_least(args, 1, "num_questions", "max_gen_length", "parallel")
    if args.temperature < 0:
        raise InputError(f"--temperature {args.temperature}: must not be negative")


def main(task: Task, argv: list[str] | None = None) -> None:
    """One benchmark against one running server. A failing server ends it with exit code 1 and one line."""
    args = parser(task).parse_args(argv)
    check_counts(args)
    questions = load_questions(task, args.question_file, args.num_questions)
    try:
        line = asyncio.run(_bench(task, args, questions))
    except BackendError as error:
        sys.exit(f"{task.name}: error: {error} (finished answers are kept; the same command continues)")
    add_result(Path(args.result_file), line)
    print(summary(line))


async def _bench(task: Task, args, questions: list[list[str]]) -> dict:
    host = args.host if "://" in args.host else "http://" + args.host
    async with Server(f"{host}:{args.port}", args.timeout) as server:
        info = await server.info()
        settings_of_server = info["settings"]
        num_steps = (
            (settings_of_server.get("speculative_num_steps") or 0) if _drafts(settings_of_server) else 0
        )
        token_map = settings_of_server.get("speculative_token_map") if num_steps else None
        arm = (
            "baseline"
            if not num_steps
            else f"fastmtp:{num_steps}" + (f"+{Path(token_map).stem}" if token_map else "")
        )
        tokenizer = load_tokenizer(args.model or info["tokenizer"])
        settings = Settings(
            task.name,
            arm,
            info["model"],
            args.temperature,
            args.max_gen_length,
            dtype=settings_of_server.get("dtype"),
        )
        answer_file = Path(
            args.answer_file or f"results/bench/{task.name}.{arm.replace(':', '-')}.answers.jsonl"
        )
        answers = await collect(
            server, tokenizer, task, questions, settings, answer_file, num_steps, args.parallel
        )
        return metrics.result_line(
            answers,
            task=task.name,
            arm=arm,
            model=info["model"],
            num_steps=num_steps,
            token_map=token_map,
            temperature=args.temperature,
            config=bench_config(task, args.question_file, settings, args.parallel),
            environment=environment(info, "sglang"),
            baseline_throughput=_baseline(Path(args.result_file), task.name, info["model"], len(answers)),
        )


def _drafts(settings: dict) -> bool:
    return bool(settings.get("speculative_algorithm"))


def load_tokenizer(folder: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no tokenizer there ({str(error).splitlines()[0]}); give --model FOLDER"
        ) from None


def _baseline(result_file: Path, task: str, model: str, questions: int) -> float | None:
    """Throughput of plain decoding on as many questions, where this result file has it."""
    if not result_file.exists():
        return None
    for _, row in read_jsonl(result_file):
        if (row.get("task"), row.get("arm"), row.get("model"), row.get("num_questions")) == (
            task,
            "baseline",
            model,
            questions,
        ):
            return row["throughput"]
    return None


def add_result(path: Path, line: dict) -> None:
    """Append a result line, in place of an earlier one of the same task, arm, model, questions and settings."""

    def identity(row: dict) -> tuple:
        named = tuple(row.get(k) for k in ("task", "arm", "model", "num_questions", "temperature"))
        return named + (json.dumps(row.get("config"), sort_keys=True),)

    rows = [row for _, row in read_jsonl(path)] if path.exists() else []
    write_jsonl(path, [row for row in rows if identity(row) != identity(line)] + [line])


def summary(line: dict) -> str:
    """One readable line of a result."""
    parts = [
        f"{line['task']} {line['arm']}: {line['num_questions']} questions, {line['output_tokens']} tokens"
    ]
    for key, text in (
        ("accept_length", "accept length {:.2f}"),
        ("throughput", "{:.1f} tok/s"),
        ("decode_throughput", "decode {:.1f} tok/s"),
        ("speedup", "{:.2f}x"),
    ):
        if line[key] is not None:
            parts.append(text.format(line[key]))
    return ", ".join(parts)
