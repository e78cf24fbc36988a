"""What an evaluation asks: arms, tasks and their questions, checked before a server starts."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from evaluation import backend_vllm, cards
from evaluation.answers import Answers
from evaluation.arguments import levels
from evaluation.arms import Arm, parse_arms
from evaluation.asking import Prompts, Settings
from evaluation.conditions import check_numbers, context_of
from evaluation.questions import Task, load_questions
from evaluation.tasks import TASKS as TASKS
from evaluation.tasks import parse_tasks
from fastmtp import checkpoint, hub
from fastmtp.cli import InputError, at_least
from fastmtp.engines import sglang, vllm
from fastmtp.engines.address import check_port
from fastmtp.engines.request import Serving
from fastmtp.engines.sglang_flags import (
    FLOAT32,
    FLOAT32_ENVIRONMENT,
    MEASURED,
    SLEEPING,
    canonical,
    merged,
    streams,
    values,
)
from fastmtp.files import check_apart, check_output, claim
from fastmtp.fingerprint import fingerprint, gpu_name, machine
from fastmtp.inputs import existing, read_json
from fastmtp.reference import model, speculative
from fastmtp.tokenizer import load_tokenizer
from fastmtp.vocab.draft_vocab import load_map

PROMPT_ROOM = 8192  # tokens of a prompt that a server with a fixed key-value pool has room for
REPEAT = "baseline_repeat"


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


class Plan:
    """What will be asked: checked arguments, arms, tasks and their questions. Raises InputError for bad
    input.
    """

    def __init__(self, args, flags: list[str]):
        check_numbers(args)
        at_least(args, 1, "at_once", "gpus")
        at_least(args, 0, "seed")
        check_port(args.port, max(args.at_once, args.gpus))
        if args.gpus > 1 and args.at_once > 1:
            raise InputError("--at-once with --gpus: with one server a card there is nothing to share")
        args.model = str(hub.model(args.model))
        self.args, self.out = args, Path(args.out)
        self.flags = canonical(flags) if args.backend == "sglang" else flags
        self._fingerprints: dict[str, dict[str, object]] = {}
        if args.vanilla_model:
            args.vanilla_model = str(hub.model(args.vanilla_model, what="vanilla model folder"))
        self.streams = levels(getattr(args, "streams", ""))
        self.most = max(args.parallel, *self.streams, 1)  # requests in flight
        if self.streams and args.parallel > 1:
            raise InputError(
                "--streams with --parallel: the table is for one request at a time; leave it out"
            )
        if args.backend == "reference" and self.most > 1:
            raise InputError(
                "--parallel, --streams: the reference backend answers one request at a time; leave them out"
            )
        if args.backend == "reference" and flags:
            raise InputError(f"{flags[0]}: the reference backend takes no flags after --")
        self.engine = vllm.installed() if args.backend == "vllm" else None
        if args.gpus > 1 and (args.backend == "reference" or self.engine and self.engine.cpu):
            raise InputError(f"--gpus {args.gpus}: {args.backend} runs on one device here; leave it out")
        self.cards = cards.chosen(args.gpus)
        if self.engine and self.most > 1 and self.engine.release < vllm.PER_REQUEST:
            raise InputError(
                f"--parallel, --streams: vLLM {self.engine.version} does not count accepted drafts per "
                "answer; use 1"
            )
        arms = parse_arms(args.arms, args.model, args.vanilla_model, args.token_map)
        self.arms = cards.spread(arms, args.gpus)
        self.tasks = parse_tasks(args.tasks)
        self.dtype = args.dtype or ("float32" if args.backend == "reference" else "bfloat16")
        self.settings = Settings(args.max_gen_length, args.temperature, args.seed, args.top_k, args.top_p)
        self.files = {task.name: question_file(args.question_folder, task) for task in self.tasks}
        self.questions = {
            task.name: load_questions(task, self.files[task.name], args.num_questions) for task in self.tasks
        }
        self._check_arms()

    def _check_arms(self) -> None:
        """A wrong folder, flag, map or chat template must not surface after an hour."""
        tokenizers = {}
        self._check_drafts()
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

    def _check_drafts(self) -> None:
        a, sampled = self.args, next((arm.name for arm in self.arms if arm.sampled), None)
        if sampled and not a.temperature:
            raise InputError(f"--arms: '{sampled}' draws its drafts at random; add --temperature")
        if sampled and a.backend == "reference":
            raise InputError(
                f"--arms: '{sampled}': the reference backend always draws its drafts; use no @sampled"
            )
        adaptive = next((arm.name for arm in self.arms if arm.adaptive), None)
        if adaptive and a.backend == "reference":
            raise InputError(f"--arms: '{adaptive}': only SGLang changes the number of steps; leave it out")
        if a.backend == "reference" and (a.top_k or a.top_p < 1):
            raise InputError(
                "--top-k, --top-p: the reference backend samples from all tokens; leave them out"
            )

    def server_flags(self) -> list[str]:
        """The engine's flags of every arm: ours, and in their place the user's."""
        if self.engine:
            return merged(["--dtype", self.dtype, "--max-num-seqs", str(self.most)], self.flags)
        ours = ["--dtype", self.dtype, "--mem-fraction-static", "0.7"]
        if self.args.at_once > 1:
            # Shares of free memory mean nothing while others are taking theirs: a fixed key-value pool each.
            # And a server that waits for its turn must not keep a core busy.
            tokens = self.most * (self.args.max_gen_length + PROMPT_ROOM)
            ours[-1:] = ["0.95", "--max-total-tokens", str(tokens), *SLEEPING]
        ours += [*streams(self.most), *MEASURED]
        if self.dtype == "float32":
            ours += FLOAT32
        return merged(ours, self.flags)

    def command(self, arm: Arm, port: int, backend: str | None = None) -> list[str]:
        """The engine's command line for one arm. `backend`: SGLang's for attention. InputError as there."""
        flags = self.server_flags()
        if self.engine:
            flags = merged(backend_vllm.flags(self.engine, arm.num_steps), flags)
        serving = Serving(arm.model, arm.num_steps, arm.token_map, port=port, flags=flags)
        serving = replace(serving, tree=arm.tree, sampled=arm.sampled, adaptive=arm.adaptive)
        if self._by_our_map(arm):
            serving = replace(serving, token_map=None, token_maps=f"map={arm.token_map}")
        return vllm.command(serving, self.engine) if self.engine else sglang.command(serving, backend)

    def environment(self, arm: Arm) -> dict[str, str]:
        """Variables for the arm's server."""
        card = {"CUDA_VISIBLE_DEVICES": self.cards[arm.card]} if self.cards else {}
        exact = FLOAT32_ENVIRONMENT if self.dtype == "float32" else {}
        if self.engine:
            return vllm.environment(self.engine, arm.model) | exact | card
        card |= sglang.tree_environment(arm.tree)
        maps = self.out / "vocab" / f"{arm.folder}.pt"
        if self._by_our_map(arm):
            card |= sglang.vocab_environment(f"map={arm.token_map}", "fixed:map", arm.model, maps)
        return exact | card

    def _by_our_map(self, arm: Arm) -> bool:
        """Whether our draft model takes the arm's map: SGLang's own gives no distribution to sample from."""
        return arm.sampled and arm.token_map is not None and not self.engine

    def ready(self, arm: Arm) -> list[str]:
        """Lines that the log of the arm's server must hold."""
        if not self.engine:
            return [sglang.VOCAB_READY] if self._by_our_map(arm) else []
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
        settings = self.settings.facts() | {"num_steps": arm.num_steps, "parallel": a.parallel}
        settings |= {"backend": a.backend, "dtype": self.dtype} | ({"card": arm.card} if self.cards else {})
        settings |= {"tree": dataclasses.asdict(arm.tree)} if arm.tree else {}
        settings |= {"drafts": "sampled"} if arm.sampled else {}
        settings |= {"steps": "adaptive"} if arm.adaptive else {}
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
            settings |= {k: v for k, v in sglang.tree_environment(arm.tree).items() if k == sglang.FAST_TREE}
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
        """(arm, number of questions per task); the baselines' first questions once more at the end."""
        jobs = [(arm, self.args.num_questions) for arm in self.arms]
        if repeat_questions:
            plain = [arm for arm in self.arms if not arm.num_steps]
            jobs += [(replace(a, name=cards.named(REPEAT, a.card)), repeat_questions) for a in plain]
        return jobs


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
