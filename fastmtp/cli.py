"""What every command shares: one-line errors with exit code 2, and the `fastmtp` console command.

A command module has `parser()` (an argparse parser built with `Parser`) and `main(argv=None)`;
it ends with `if __name__ == "__main__": run(main)`. Bad input raises `InputError("what, where, what to do")`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

COMMANDS = {
    "prepare_model": "MiMo-7B, a Llama/Qwen2 checkpoint or a GGUF file -> MiMo layout with an MTP head",
    "fit_head": "a start for a fresh head, by least squares instead of training",
    "distill": "the frozen model answers every prompt itself",
    "curate": "clean, de-duplicate and split the answers; write ms-swift's training file",
    "build_vocab": "token maps: the language's frequent tokens, for a cheaper draft",
    "train": "fine-tune the head through `swift sft` on a recipe",
    "export": "head + base -> one folder that SGLang loads as it is",
    "acceptance": "accept length (tau) and per-position rates from one teacher-forced pass",
    "ablation": "train every arm of configs/ablation.yaml from one start and print the table",
    "serve": "start an SGLang server with the head's drafts and wait until it answers",
    "decoding": "reference speculative decoder: plain against drafts on your prompts",
    "report": "markdown table, loss curves and acceptance curves of a run",
    "quickstart": "all of the above on a small real model",
}


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
    """InputError for an argument in `names` below `least`; one that is None was not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main`; exit 0 done, 2 bad input (one line on stderr), 1 anything else."""
    name = getattr(main, "__module__", "fastmtp").removesuffix(".cli")
    if name == "__main__":  # started as `python -m fastmtp.x`, or as a file
        spec = sys.modules["__main__"].__spec__
        name = spec.name if spec else sys.argv[0]
    try:
        main()
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if error.filename is None:
            raise
        path = error.filename2 or error.filename  # of a rename, where it should go
        print(f"{name}: error: {path}: cannot be used ({error.strerror}); give another path", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues where this one stopped", file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(0)


def main(argv: Sequence[str] | None = None) -> None:
    """`fastmtp COMMAND ...` is `python -m fastmtp.COMMAND ...`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastmtp COMMAND [options]\n\ncommands (each has --help):")
        for command, text in COMMANDS.items():
            print(f"  {command:<14} {text}")
        return
    if argv[0] not in COMMANDS:
        raise InputError(f"unknown command '{argv[0]}'; choose one of {', '.join(COMMANDS)}")
    importlib.import_module(f"fastmtp.{argv[0]}").main(argv[1:])


def entry() -> NoReturn:
    """The console script."""
    run(main)
