"""SIGKILL anywhere in a command's life: what is left, what the same command makes of it, and disks that fill.

The command runs in a forked child (no start to pay for), which ends at a random moment or just before its nth
change of a file in the folder where it works: opening a file to write, renaming, removing, making a folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


Act = Callable[[int, str], None]


def watch(folder: str | Path, act: Act) -> None:
    """From now on, call `act` just before each change of a file in `folder` by this process, with its number
    (1, 2, ...) and its name.
    """
    folder, counted, inside = os.path.realpath(folder) + os.sep, [0], [False]

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (
            inside[0]
            or not (writes or event in CHANGES)
            or not isinstance(args[0], str | bytes | os.PathLike)
        ):
            return
        inside[0] = True
        try:
            # a name relative to an open folder counts as one of the working folder, which is `folder`
            if os.path.abspath(os.fsdecode(args[0])).startswith(folder):
                counted[0] += 1
                act(counted[0], event)
        finally:
            inside[0] = False

    sys.addaudithook(hook)


def kill_at(step: int) -> Act:
    """For `watch`: SIGKILL to this process before the change number `step`."""
    return lambda number, _: os.kill(os.getpid(), signal.SIGKILL) if number == step else None


def full_at(step: int) -> Act:
    """For `watch`: no space left from the change number `step` on. What only removes still works."""

    def act(number: int, change: str) -> None:
        if number >= step and change not in ("os.remove", "os.rmdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


@dataclass
class Ended:
    """A child: its exit code (-9 if it was killed), the changes that it made, its stderr and its seconds."""

    code: int
    changes: int
    err: str
    seconds: float


def run_in(
    folder: Path,
    action: Callable[[], None],
    act: Act = lambda number, change: None,
    seconds: float | None = None,
) -> Ended:
    """Run a command's `main` as a process in `folder`; SIGKILL to its process group after `seconds`."""
    fork, log = multiprocessing.get_context("fork"), folder.with_name(folder.name + ".log")
    changes = fork.Value("i", 0)

    def count(number: int, change: str) -> None:
        act(number, change)
        changes.value = number

    def alone() -> None:
        os.setsid()
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(
                os.open(log if stream == 2 else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream
            )
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
        watch(folder, count)
        from fastmtp.cli import run

        run(action, "command")

    child, begun = fork.Process(target=alone), time.monotonic()
    child.start()
    child.join(seconds)
    if child.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()  # the group, if the child has come as far as making one
    child.join()
    err = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return Ended(child.exitcode, changes.value, err, time.monotonic() - begun)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder by its name there, as a hash; a link as what it names. {} without one."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@dataclass
class Command:
    """A command that is killed: `make` fills a new folder with its inputs, `action` is its `main` there.

    result: what must come out of it, comparable; None as long as there is nothing to see.
    kept: fails if, after a kill, something is half-written or lost.
    """

    make: Callable[[Path], None]
    action: Callable[[], None]
    result: Callable[[Path], object]
    kept: Callable[[Path, object, object], None]
    hits: Counter = field(default_factory=Counter)

    def undisturbed(self, place: Path) -> tuple[object, object, Ended]:
        """(the result before, the result after, the child) of a run that nobody disturbs."""
        self.make(place)
        before = self.result(place)
        ended = run_in(place, self.action)
        assert ended.code == 0, ended.err
        return before, self.result(place), ended

    def killed(self, work: Path, kills: int, seed: int = 0) -> Counter:
        """Kill it `kills` times, each time in a new folder, and run it again there; what the kills hit.

        Every second kill comes before a change of a file, spread evenly over all of them; the others come at
        random moments.
        """
        before, expected, ended = self.undisturbed(work / "undisturbed")
        names, dice = contents(work / "undisturbed").keys(), random.Random(seed)
        for number in range(kills):
            place = work / f"kill-{number}"
            self.make(place)
            if number % 2:
                first = run_in(place, self.action, seconds=dice.uniform(0, ended.seconds))
            else:
                step = 1 + round(number / max(kills - 2, 1) * (ended.changes - 1))
                first = run_in(place, self.action, kill_at(step))
            now = self.result(place)
            self.hits["before" if not first.changes else "after" if now == expected else "while writing"] += 1
            self.kept(place, before, expected)
            again = run_in(place, self.action)
            assert again.code == 0, f"kill {number} after {first.changes} changes: {again.err}"
            assert self.result(place) == expected, f"kill {number} after {first.changes} changes"
            left = contents(place).keys() ^ names
            assert not left, f"kill {number} after {first.changes} of {ended.changes} changes: {left}"
            self.hits["ended right"] += 1
        return self.hits

    def filled(self, work: Path, times: int, disk: bool) -> Counter:
        """Let the disk be full at `times` points, and run it again with space; exit codes by number.

        disk: a small disk of its own, so that a file may be cut; else an error from some change on.
        """
        before, expected, ended = self.undisturbed(work / "undisturbed")
        names, codes = contents(work / "undisturbed").keys(), Counter()
        for number in range(times):
            place, share = work / f"full-{number}", number / max(times - 1, 1)
            with contextlib.ExitStack() as stack:
                if disk:
                    stack.enter_context(small_disk(place))
                self.make(place)
                if disk:
                    needed = pages(work / "undisturbed") - pages(place)
                    resize(place, pages(place) + int(needed * share * 0.9))
                    told, first = f"{share:.0%} of the space", run_in(place, self.action)
                    resize(place, 1 << 14)
                else:
                    step = 1 + round(share * (ended.changes - 1))
                    told, first = f"change {step}", run_in(place, self.action, full_at(step))
                codes[first.code] += 1
                told += f": exit {first.code}, {first.err}"
                lines = [line for line in first.err.splitlines() if "disk is full" in line]
                assert "Traceback" not in first.err, told
                assert (first.code in (1, 2) and len(lines) == 1) or first.code == 0, told
                self.kept(place, before, expected)
                again = run_in(place, self.action)
                assert again.code == 0 and self.result(place) == expected, told + again.err
                assert contents(place).keys() == names, f"{told} {contents(place).keys() ^ names}"
        assert codes.keys() - {0}, "the disk was never full"
        return codes


def pages(folder: Path) -> int:
    """Pages that a folder takes on a small disk."""
    return sum(-(-path.lstat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


def can_mount() -> bool:
    return (
        os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    )


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of its own at `folder`, with plenty of space: `resize` changes that."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "small", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, count: int) -> None:
    """Give a small disk `count` pages."""
    subprocess.run(["mount", "-o", f"remount,size={4096 * max(count, 1)}", str(folder)], check=True)


HOOK = """import os, signal
if "FASTMTP_PARENT" in os.environ and "KILL_STEP" in os.environ:
    from helpers.killing import watch
    def act(number, _):
        open(os.environ["KILL_COUNT"], "w").write(str(number))
        if number == int(os.environ["KILL_STEP"]):
            os.kill(int(os.environ["FASTMTP_PARENT"]), signal.SIGKILL)
            os.killpg(0, signal.SIGKILL)
    watch(os.environ["KILL_FOLDER"], act)
"""


def inside_swift(folder: Path, watched: Path, step: int) -> dict[str, str]:
    """Environment in which fastmtp.train and its ms-swift are killed before ms-swift's change number `step`
    of a file in `watched` (0: never). `folder` gets the hook and the count of changes.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    tests = Path(__file__).resolve().parents[1]
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(tests), str(tests.parent)]),
        "KILL_STEP": str(step),
        "KILL_COUNT": str(folder / "changes"),
        "KILL_FOLDER": str(watched),
    }
