"""What an evaluation asks: arms, tasks and their questions, checked before a server starts.

Arms: `baseline`, `vanilla:K`, `fastmtp:K`, each speculative one with `+MAP` for a draft vocabulary. K is the
number of draft steps. `vanilla` is the head as it was before training and lives in a model folder of its own;
`baseline` is the same model without drafts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation import backend_vllm
from evaluation.answers import Answers
from evaluation.asking import Prompts, Settings
from evaluation.conditions import check_numbers, context_of
from evaluation.questions import Task, load_questions
from evaluation.tasks import TASKS as TASKS
from evaluation.tasks import parse_tasks
from fastmtp import checkpoint, hub
from fastmtp.cli import InputError, Parser, at_least
from fastmtp.engines import sglang, vllm
from fastmtp.engines.address import check_port
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang_flags import (
    FLOAT32,
    FLOAT32_ENVIRONMENT,
    MEASURED,
    canonical,
    merged,
    streams,
    values,
)
from fastmtp.files import check_apart, check_output, claim
from fastmtp.fingerprint import fingerprint, gpu_name, machine
from fastmtp.inputs import existing, read_json, resource
from fastmtp.reference import model, speculative
from fastmtp.tokenizer import load_tokenizer
from fastmtp.trees.tree import DynamicTree
from fastmtp.vocab.draft_vocab import load_map

PROMPT_ROOM = 8192  # tokens of a prompt that a server with a fixed key-value pool has room for
REPEAT = "baseline_repeat"
TOPK = 4  # of an arm's tree that names its nodes alone


@dataclass(frozen=True)
class Arm:
    """num_steps 0: plain decoding. token_map: a path, or None for the full head. tree: instead of a chain."""

    name: str
    model: str
    num_steps: int
    token_map: str | None
    map_name: str | None = None
    tree: DynamicTree | None = None

    @property
    def folder(self) -> str:
        """The name as a folder name."""
        return self.name.replace(":", "-")


def parse_arms(names: str, model: str, vanilla_model: str | None, token_maps: list[str]) -> list[Arm]:
    """`--arms` and `--token-map NAME=PATH ...` -> arms, baseline first. Raises InputError for what cannot be
    run.
    """
    maps = dict(_named(item) for item in token_maps)
    arms = [_arm(name.strip(), model, vanilla_model, maps) for name in names.split(",") if name.strip()]
    if not arms:
        raise InputError("--arms: empty; for example --arms baseline,fastmtp:3")
    doubled = {a.name for a in arms if sum(b.name == a.name for b in arms) > 1}
    if doubled:
        raise InputError(f"--arms: {', '.join(sorted(doubled))} is named twice; name each arm once")
    return sorted(arms, key=lambda arm: arm.num_steps > 0)  # stable: only the baseline moves


def _named(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if not equals or not name or not path:
        raise InputError(f"--token-map {item}: expected NAME=PATH, for example en32k=vocab/smollm2/en_32k.pt")
    return name, str(existing(hub.token_map(str(resource(path))), "token map"))


def _arm(name: str, model: str, vanilla_model: str | None, maps: dict[str, str]) -> Arm:
    if name == "baseline":
        return Arm(name, model, 0, None)
    match = re.fullmatch(r"(vanilla|fastmtp):([1-9]\d?)(?:\+(\w[\w.-]*))?(?:@tree(?:(\d+)x)?(\d+))?", name)
    if not match:
        raise InputError(
            f"--arms: '{name}' is not baseline, vanilla:K or fastmtp:K, with +MAP for a token map and "
            "@treeTOPKxNODES for a draft tree"
        )
    kind, steps, map_name, topk, nodes = match.groups()
    if map_name and map_name not in maps:
        raise InputError(f"--arms: '{name}' needs --token-map {map_name}=PATH")
    if kind == "vanilla" and not vanilla_model:
        raise InputError(f"--arms: '{name}' needs --vanilla-model, the folder with the head before training")
    folder = vanilla_model if kind == "vanilla" else model
    tree = _tree(name, int(topk or TOPK), int(steps), int(nodes)) if nodes else None
    return Arm(name, folder, int(steps), maps.get(map_name) if map_name else None, map_name, tree)


def _tree(arm: str, topk: int, depth: int, nodes: int) -> DynamicTree:
    try:
        return DynamicTree(topk, depth, nodes)
    except ValueError as error:
        raise InputError(f"--arms: '{arm}': {error}") from None


def question_file(folder: str | None, task: Task) -> Path | None:
    """FOLDER/TASK.jsonl, or the one file whose name begins with the task's; None without a folder (then the
    Hub).
    """
    if folder is None:
        return None
    exact = [existing(folder, "folder") / f"{task.name}{ending}" for ending in (".jsonl", ".jsonl.gz")]
    matches = [path for path in exact if path.exists()] or sorted(
        path for path in Path(folder).glob(f"{task.name}*.jsonl*") if path.name.endswith((".jsonl", ".gz"))
    )
    if len(matches) != 1:
        raise InputError(
            f"{folder}: {len(matches) or 'no'} files named {task.name}*.jsonl; give exactly one, or leave the"
            " task out"
        )
    return matches[0]


def add_arguments(p: Parser) -> None:
    """What `run` and `lossless` share."""
    p.add_argument(
        "--model", required=True, metavar="FOLDER", help="exported model, or its ORG/NAME on a hub"
    )
    p.add_argument("--vanilla-model", metavar="FOLDER", help="the same model with the head before training")
    p.add_argument(
        "--arms",
        default="baseline,fastmtp:3",
        help="baseline, vanilla:K, fastmtp:K, +MAP, @treeTOPKxNODES (default %(default)s)",
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
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=0, help="of sampling, if the temperature is above 0")
    p.add_argument("--parallel", type=int, default=1, help="requests in flight; speed-ups are defined at 1")
    p.add_argument(
        "--at-once", type=int, default=1, help="servers started side by side, asked one after the other"
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


class Plan:
    """What will be asked: checked arguments, arms, tasks and their questions. Raises InputError for bad
    input.
    """

    def __init__(self, args, flags: list[str]):
        check_numbers(args)
        at_least(args, 1, "at_once")
        at_least(args, 0, "seed")
        check_port(args.port, args.at_once)
        args.model = str(hub.model(args.model))
        self.args, self.out = args, Path(args.out)
        self.flags = canonical(flags) if args.backend == "sglang" else flags
        self._fingerprints: dict[str, dict[str, object]] = {}
        if args.vanilla_model:
            args.vanilla_model = str(hub.model(args.vanilla_model, what="vanilla model folder"))
        if args.backend == "reference" and args.parallel > 1:
            raise InputError("--parallel: the reference backend answers one request at a time; leave it out")
        if args.backend == "reference" and flags:
            raise InputError(f"{flags[0]}: the reference backend takes no flags after --")
        self.engine = vllm.installed() if args.backend == "vllm" else None
        if self.engine and args.parallel > 1 and self.engine.release < vllm.PER_REQUEST:
            raise InputError(
                f"--parallel: vLLM {self.engine.version} does not count accepted drafts per answer; use 1"
            )
        self.arms = parse_arms(args.arms, args.model, args.vanilla_model, args.token_map)
        self.tasks = parse_tasks(args.tasks)
        self.dtype = args.dtype or ("float32" if args.backend == "reference" else "bfloat16")
        self.settings = Settings(args.max_gen_length, args.temperature, args.seed)
        self.files = {task.name: question_file(args.question_folder, task) for task in self.tasks}
        self.questions = {
            task.name: load_questions(task, self.files[task.name], args.num_questions) for task in self.tasks
        }
        self._check_arms()

    def _check_arms(self) -> None:
        """A wrong folder, flag, map or chat template must not surface after an hour."""
        tokenizers = {}
        for arm in self.arms:
            if self.args.backend != "reference":
                self.command(arm, self.args.port, "triton")
            if arm.model not in tokenizers:
                tokenizers[arm.model] = load_tokenizer(arm.model)
                said = values(self.flags)
                context = context_of(arm.model, said.get("--context-length", said.get("--max-model-len")))
                for task in self.tasks:
                    source = self.files[task.name] or task.dataset
                    prompts, questions = Prompts(tokenizers[arm.model], task), self.questions[task.name]
                    prompts.check(questions, context, source)
            if arm.token_map:
                size = sglang.vocabulary(arm.model, read_json(Path(arm.model) / "config.json"))
                load_map(arm.token_map, tokenizers[arm.model], size)
        self.tokenizers = tokenizers

    def server_flags(self) -> list[str]:
        """The engine's flags of every arm: ours, and in their place the user's."""
        if self.engine:
            return merged(["--dtype", self.dtype, "--max-num-seqs", str(self.args.parallel)], self.flags)
        ours = ["--dtype", self.dtype, "--mem-fraction-static", "0.7"]
        if self.args.at_once > 1:
            # Shares of free memory mean nothing while others are taking theirs: a fixed key-value pool each.
            tokens = self.args.parallel * (self.args.max_gen_length + PROMPT_ROOM)
            ours[-1:] = ["0.95", "--max-total-tokens", str(tokens)]
        ours += [*streams(self.args.parallel), *MEASURED]
        if self.dtype == "float32":
            ours += FLOAT32
        return merged(ours, self.flags)

    def command(self, arm: Arm, port: int, backend: str | None = None) -> list[str]:
        """The engine's command line for one arm. `backend`: SGLang's for attention. InputError as there."""
        flags = self.server_flags()
        if self.engine:
            flags = merged(backend_vllm.flags(self.engine, arm.num_steps), flags)
        serving = Serving(arm.model, arm.num_steps, arm.token_map, tree=arm.tree, port=port, flags=flags)
        return vllm.command(serving, self.engine) if self.engine else sglang.command(serving, backend)

    def environment(self, arm: Arm) -> dict[str, str]:
        """Variables for the arm's server."""
        if self.engine:
            return vllm.environment(self.engine, arm.model)
        return FLOAT32_ENVIRONMENT if self.dtype == "float32" else {}

    def ready(self, arm: Arm) -> list[str]:
        """Lines that the log of the arm's server must hold."""
        if not self.engine:
            return []
        config = read_json(Path(arm.model) / "config.json")
        return vllm.ready_lines(config, arm.num_steps, arm.token_map)

    def fingerprint(self, arm: Arm) -> dict[str, object]:
        """All that the arm's answers and their speed depend on."""
        if arm.name not in self._fingerprints:
            self._fingerprints[arm.name] = self._fingerprint(arm)
        return self._fingerprints[arm.name]

    def _fingerprint(self, arm: Arm) -> dict[str, object]:
        a, head = self.args, Path(arm.model) / checkpoint.HEAD_FILE
        contents = {
            "model": arm.model,
            "head": head if head.exists() else None,
            "token map": arm.token_map,
        }
        settings = vars(self.settings) | {"num_steps": arm.num_steps, "parallel": a.parallel}
        settings |= {"backend": a.backend, "dtype": self.dtype}
        settings |= {"tree": dataclasses.asdict(arm.tree)} if arm.tree else {}
        if a.backend == "reference":
            contents["decoder"] = [model.__file__, speculative.__file__, *checkpoint.CODE]
            settings |= {"device": a.device} | machine()
            settings |= {"gpu": None} if a.device == "cpu" else {}
        elif self.engine:
            settings |= {"gpu": None} if self.engine.cpu else {"gpu": gpu_name()}
            settings |= {"vllm": self.engine.version} | machine() | values(self.server_flags())
            settings |= vllm.environment(self.engine, arm.model)
            settings |= {k: v for k, v in os.environ.items() if k.startswith("VLLM_") and "KEY" not in k}
        else:
            settings |= {"gpu": gpu_name(), "sglang": _version("sglang")}
            settings |= {"--attention-backend": sglang.attention_backend()} | values(self.server_flags())
            settings |= {k: v for k, v in os.environ.items() if k.startswith("SGLANG_") and "KEY" not in k}
        return fingerprint(contents, settings)

    def claim(self, *outputs: str) -> None:
        """Hold the folder for this process. InputError if an output would replace somebody's file in it."""
        check_apart(self.out, *(arm.model for arm in self.arms), self.args.question_folder)
        claim(self.out, folder=True)
        logs = [f"logs/{arm.folder}.log" for arm in self.arms]
        for name in (*outputs, *logs, *(f"environments/{arm.folder}.json" for arm in self.arms)):
            check_output(self.out / name)

    def note(self, arm: Arm) -> Path:
        """Where the arm's answers come from: engine, versions."""
        return self.out / "environments" / f"{arm.folder}.json"

    @contextlib.contextmanager
    def answers(self, jobs: list[tuple[Arm, int]]) -> Iterator[dict[tuple[str, str], Answers]]:
        """The answer file of each (arm, task), held until the block ends.

        Raises InputError if one was made under other settings.
        """
        opened: dict[tuple[str, str], Answers] = {}
        try:
            for arm, _ in jobs:
                depends = self.fingerprint(arm)
                for task in self.tasks:
                    path = self.out / "answers" / arm.folder / f"{task.name}.jsonl"
                    opened[arm.name, task.name] = Answers(path, depends, "--out")
            yield opened
        finally:
            for one in opened.values():
                one.close()

    def jobs(self, repeat_questions: int) -> list[tuple[Arm, int]]:
        """(arm, number of questions per task); the baseline's first questions once more at the end."""
        jobs = [(arm, self.args.num_questions) for arm in self.arms]
        if repeat_questions and self.arms[0].num_steps == 0:
            jobs.append((replace(self.arms[0], name=REPEAT), repeat_questions))
        return jobs


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
