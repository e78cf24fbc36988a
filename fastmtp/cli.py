"""What every command shares: one-line errors with exit code 2, and the `fastmtp` console command.

A command module has `parser()` (an argparse parser built with `Parser`) and `main(argv=None)`;
it ends with `if __name__ == "__main__": run(main)`. Bad input raises `InputError("what, where, what to do")`.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import importlib
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Command:
    """A module with a `main`; `resumes`: the same command continues where an interrupted one stopped."""

    module: str
    about: str
    resumes: bool = False


COMMANDS = {
    "prepare_model": Command(
        "fastmtp.prepare_model",
        "MiMo-7B, a Llama/Qwen2 checkpoint or a GGUF file -> MiMo layout with an MTP head",
    ),
    "fit_head": Command("fastmtp.fit_head", "a start for a fresh head, by least squares instead of training"),
    "distill": Command("fastmtp.distill", "the frozen model answers every prompt itself", resumes=True),
    "curate": Command(
        "fastmtp.curate", "clean, de-duplicate and split the answers; write ms-swift's training file"
    ),
    "build_vocab": Command(
        "fastmtp.build_vocab", "token maps: the language's frequent tokens, for a cheaper draft"
    ),
    "train": Command("fastmtp.train", "fine-tune the head through `swift sft` on a recipe", resumes=True),
    "export": Command("fastmtp.export", "head + base -> one folder that an engine loads as it is"),
    "acceptance": Command(
        "fastmtp.acceptance", "accept length (tau) and per-position rates from one teacher-forced pass"
    ),
    "plan": Command(
        "fastmtp.plan", "which steps, tree and map bring the most, from your answers and your card's costs"
    ),
    "serve": Command("fastmtp.serve", "start a server with the head's drafts and wait until it answers"),
    "doctor": Command(
        "fastmtp.doctor", "will this model folder, or this server, work? one page says why not"
    ),
    "decoding": Command(
        "fastmtp.decoding",
        "reference speculative decoder: plain against drafts on your prompts",
        resumes=True,
    ),
    "bench": Command(
        "evaluation.harness", "one benchmark against a running server: fastmtp bench TASK", resumes=True
    ),
    "evaluate": Command("evaluation.run", "seven benchmarks, every arm: table and charts", resumes=True),
    "ablation": Command(
        "fastmtp.ablation", "train every arm of configs/ablation.yaml and print the table", resumes=True
    ),
    "report": Command("fastmtp.report", "markdown table, loss curves and acceptance curves of a run"),
    "speedrun": Command(
        "fastmtp.speedrun", "from a raw model to the paper's table, on 1 to N GPUs", resumes=True
    ),
    "quickstart": Command("fastmtp.quickstart", "all of the above on a small real model", resumes=True),
}


before_refusal: list[Callable[[], None]] = []  # called when a command ends on an InputError


class InputError(Exception):
    """Wrong use or bad input. The message is one line: what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse with the example kept as written and errors on one line."""

    def __init__(self, prog: str, description: str, example: str):
        super().__init__(
            prog=prog,
            description=description,
            epilog="example:\n  " + example.strip().replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def split_at_dashes(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """A command's own arguments and, after `--`, an engine's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """InputError for an argument in `names` below `least`; None means that it was left out."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def run(main: Callable[[], None], name: str | None = None) -> NoReturn:
    """Run a command's `main`; exit 0 done, 2 bad input (one line on stderr), 1 anything else.

    An error that nobody foresaw keeps its traceback, for a report of it, and ends with one clear line.
    """
    name = name or _name_of(main)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # half an emoji in a name must not end a command
    try:
        main()
        sys.stdout.flush()  # a full disk behind `> file` shows here; afterwards it would pass for success
    except InputError as error:
        for undo in before_refusal:
            undo()
        _stop(2, f"{name}: error: {error}")
    except KeyboardInterrupt:
        _stop(1, f"{name}: interrupted{_after_interruption(name)}")
    except Exception as error:
        _stop(*_explain(name, error))
    raise SystemExit(0)


def _explain(name: str, error: Exception) -> tuple[int, str | None]:
    """Exit code and last line for an exception that is no InputError."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return 1, None  # `fastmtp ... | head`: the reader has what it wanted
    if isinstance(error, OSError):
        path = error.filename2 or error.filename  # of a rename, where it should go
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return 2, f"{name}: error: {path or 'output'}: the disk is full; free some space and try again"
        if path is not None:
            return 2, f"{name}: error: {path}: cannot be used ({error.strerror}); give another path"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        first = (str(error).splitlines() or [""])[0]
        return 1, f"{name}: error: out of memory ({first or 'RAM'}); use smaller batches or a larger machine"
    traceback.print_exception(error)
    kind = type(error).__name__
    return 1, f"{name}: error: unexpected {kind}; this is a bug: please report it with the lines above"


def _stop(code: int, line: str | None) -> NoReturn:
    if line is not None:
        print(" ".join(line.splitlines()), file=sys.stderr)
    raise SystemExit(code) from None


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes again at its end
    return True


def _name_of(main: Callable[[], None]) -> str:
    name = getattr(main, "__module__", "fastmtp").removesuffix(".cli")
    if name == "__main__":  # started as `python -m fastmtp.x`, or as a file
        spec = sys.modules["__main__"].__spec__
        name = spec.name if spec else sys.argv[0]
    return name


def _after_interruption(name: str) -> str:
    """What the same command does next time. Nothing is said of a module that is not in the table."""
    if name.removesuffix(".py").endswith("bench_sglang_eagle"):
        name = "fastmtp bench"
    for key, command in COMMANDS.items():
        if name in (f"fastmtp {key}", command.module):
            then = "continues where this one stopped" if command.resumes else "starts from the beginning"
            return f"; the same command {then}"
    return ""


def main(argv: Sequence[str] | None = None) -> None:
    """`fastmtp COMMAND ...` is `python -m MODULE ...`, as the table says."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastmtp COMMAND [options]\n\ncommands (each has --help):")
        for name, command in COMMANDS.items():
            print(f"  {name:<14} {command.about}")
        return
    if argv[0] in ("-V", "--version"):
        print(f"fastmtp {importlib.import_module('fastmtp').__version__}")
        return
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.lower(), COMMANDS, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise InputError(f"unknown command '{name}'; {hint}")
    run(functools.partial(bench if name == "bench" else _module(name).main, rest), f"fastmtp {name}")


def bench(argv: Sequence[str]) -> None:
    """`fastmtp bench TASK ...`: one benchmark against a running server."""
    tasks = _module("bench", "evaluation.tasks").TASKS
    if not argv:
        raise InputError(f"give a task, one of {', '.join(tasks)}")
    if argv[0] in ("-h", "--help"):
        print("usage: fastmtp bench TASK [options]\n\ntasks (each has --help):")
        for name, task in tasks.items():
            print(f"  {name:<14} {task.title}")
        print("\nexample: fastmtp bench mt_bench --server http://127.0.0.1:30000 --num-questions 8")
        return
    if argv[0] not in tasks:
        raise InputError(f"unknown task '{argv[0]}'; choose one of {', '.join(tasks)}")
    _module("bench").main(tasks[argv[0]], list(argv[1:]))


def _module(name: str, module: str | None = None):
    """The module of a command. InputError if the evaluation package is not there."""
    module = module or COMMANDS[name].module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "evaluation":
            raise
        cure = "run it from the checkout, or install the project there: pip install -e ."
        raise InputError(f"fastmtp {name} needs the package evaluation; {cure}") from None


def entry() -> NoReturn:
    """The console script."""
    run(main)
