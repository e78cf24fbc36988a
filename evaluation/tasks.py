"""The seven tasks by name, in the paper's order."""

from __future__ import annotations

from pathlib import Path

from evaluation.c_eval.bench_sglang_eagle import TASK as C_EVAL
from evaluation.cnn_dm.bench_sglang_eagle import TASK as CNN_DM
from evaluation.livecodebench.bench_sglang_eagle import TASK as LIVECODEBENCH
from evaluation.math_500.bench_sglang_eagle import TASK as MATH_500
from evaluation.mt_bench.bench_sglang_eagle import TASK as MT_BENCH
from evaluation.nq_qa.bench_sglang_eagle import TASK as NQ_QA
from evaluation.nq_rag.bench_sglang_eagle import TASK as NQ_RAG
from evaluation.questions import Task
from fastmtp.cli import InputError
from fastmtp.files import existing

TASKS = {t.name: t for t in (MT_BENCH, LIVECODEBENCH, MATH_500, NQ_QA, NQ_RAG, CNN_DM, C_EVAL)}


def parse_tasks(names: str) -> list[Task]:
    """`all` or a comma-separated list."""
    if names == "all":
        return list(TASKS.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        raise InputError(f"--tasks: '{', '.join(unknown) or names}' is not a task; choose all or {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(wanted)]


def question_file(folder: str | None, task: Task) -> Path | None:
    """FOLDER/TASK.jsonl, or the one file whose name begins with the task's; None without a folder (then the Hub)."""
    if folder is None:
        return None
    exact = existing(folder, "folder") / f"{task.name}.jsonl"
    found = [exact] if exact.exists() else sorted(Path(folder).glob(f"{task.name}*.jsonl"))
    if len(found) != 1:
        raise InputError(
            f"{folder}: {len(found) or 'no'} files named {task.name}*.jsonl; expected one, or leave the task out"
        )
    return found[0]
