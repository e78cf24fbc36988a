"""Where this code runs from (a checkout or an installed package), its git commit, and the running command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path


def checkout() -> Path | None:
    """The root of the checkout that this code runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    try:
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    return root if 'name = "fastmtp"' in project else None


def python_path() -> str:
    """PYTHONPATH for a process that must import this package, even if it is not installed."""
    return os.pathsep.join(
        [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )


def command_line() -> str:
    """The command that is running, as a user would type it: no paths of this installation, no keys."""
    program, words = Path(sys.argv[0]), _without_keys(sys.argv[1:])
    if not program.is_absolute() and not program.exists():  # -c, or a bare name
        return shlex.join(["python", sys.argv[0], *words])
    root = Path(__file__).resolve().parents[1]
    program = program.resolve()
    if program.is_relative_to(root) and program.suffix == ".py":
        parts = program.relative_to(root).with_suffix("").parts
        if all(part.isidentifier() for part in parts):
            # `-m fastmtp.x` runs anywhere; the file's path would only tell whose machine this was.
            return shlex.join(["python", "-m", ".".join(parts).removesuffix(".__main__"), *words])
    return shlex.join([program.name, *words])  # `fastmtp distill ...`, or somebody's own program


def _without_keys(words: list[str]) -> list[str]:
    """Command-line words with every API key replaced: a record is passed on, a key is not."""
    before = ["", *words][: len(words)]
    return [
        "***"
        if re.fullmatch("--(admin-)?api-key", flag)
        else re.sub("(?s)(--(admin-)?api-key=).*", r"\1***", word)
        for flag, word in zip(before, words, strict=True)
    ]


def git_state() -> dict[str, object]:
    """{"git_commit", "git_dirty"} of this checkout; None for both if there is none of our own.

    A package installed inside somebody's repository, or copied into it, must not report that repository.
    """
    unknown = {"git_commit": None, "git_dirty": None}
    root = checkout()
    # A hook's GIT_DIR or GIT_WORK_TREE would speak of the repository that the hook runs in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def ask(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", root, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    if root is None:
        return unknown
    try:
        if Path(ask("rev-parse", "--show-toplevel").strip()).resolve() != root:
            return unknown
        commit = ask("rev-parse", "HEAD").strip()
        changes = [line[:2] + line[3:].strip('"') for line in ask("status", "--porcelain").splitlines()]
    except (OSError, subprocess.CalledProcessError):
        return unknown
    # A new file counts if it may be code; data, runs and results of one's own do not.
    code = tuple(f"??{folder}/" for folder in ("fastmtp", "evaluation", "benchmarks"))
    dirty = any(not line.startswith("??") or line.startswith(code) for line in changes)
    return {"git_commit": commit, "git_dirty": dirty}
