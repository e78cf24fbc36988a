"""Under which conditions answers came: the numbers asked for, checked, and what a result line records."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from evaluation.asking import Settings
from evaluation.questions import Task, digest, question_keys
from fastmtp.cli import InputError, at_least
from fastmtp.files import provenance
from fastmtp.fingerprint import gpu_name
from fastmtp.inputs import read_json


def check_numbers(args: argparse.Namespace) -> None:
    """InputError for a count, time or temperature that cannot be."""
    at_least(args, 1, "num_questions", "max_gen_length", "parallel")
    if not 0 <= args.temperature < math.inf:
        raise InputError(f"--temperature {args.temperature}: must be a number of at least 0")
    top_k, top_p = getattr(args, "top_k", 0), getattr(args, "top_p", 1.0)
    at_least(argparse.Namespace(top_k=top_k), 0, "top_k")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: must be above 0 and at most 1")
    if (top_k or top_p < 1) and not args.temperature:
        raise InputError("--top-k, --top-p: greedy decoding takes the likeliest token; add --temperature")
    if not 0 < args.timeout < math.inf:
        raise InputError(f"--timeout {args.timeout}: must be a number above 0")


def check_tolerance(tolerance: float) -> None:
    """InputError for a --tolerance that cannot be."""
    if not 0 <= tolerance < math.inf:
        raise InputError(f"--tolerance {tolerance}: must be a number of at least 0")


def context_of(folder: str, said: object = None) -> int | None:
    """Tokens that a prompt and its answer may have: what the engine was told, or else what the model's folder
    says; None if that is not known here.
    """
    if str(said).isdigit():
        return int(said)
    path = Path(folder) / "config.json"
    context = read_json(path).get("max_position_embeddings") if path.is_file() else None
    return context if type(context) is int else None


def counts(asked: int, total: int) -> str:
    """How many answers of a run are new."""
    return f"{asked} asked, {total - asked} kept"


def environment(backend_info: dict, backend: str) -> dict:
    """Where the figures come from: engine, its settings, package versions, GPU."""
    facts = provenance({})
    versions = facts["versions"] | ({backend: backend_info["version"]} if backend_info["version"] else {})
    return {
        "backend": backend,
        "versions": versions,
        "git_commit": facts["git_commit"],
        "gpu": gpu_name(),
        "settings": backend_info["settings"],
        "finished": facts["finished"],
    }


def bench_config(
    task: Task,
    question_file: str | Path | None,
    questions: list[list[str]],
    settings: Settings,
    parallel: int,
    depends: dict[str, object],
) -> dict:
    """What a result line says about how it was made. `fingerprint`: what the answers depend on."""
    source = {"dataset": task.dataset, "revision": task.revision}
    if question_file:
        source = {"file": Path(question_file).name}
    source["digest"] = digest(sorted(set(question_keys(task, questions))))
    shared = {name: value for name, value in settings.facts().items() if name != "temperature"}
    shared["parallel"] = parallel
    return shared | {"questions": source, "chat_template": "model", "fingerprint": depends}
