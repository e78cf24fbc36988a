"""Runs a stage as a process of its own, with its own log, and ends it with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastmtp.checkout import python_path
from fastmtp.pipeline.stages import Stage

PATIENCE = 60  # seconds that an interrupted command has to end its servers
LAST_LINES = 12


class StageFailed(Exception):
    """A stage's command ended with an error. `code`: its exit code; `stage`: its name."""

    def __init__(self, stage: Stage, code: int, log: Path):
        self.code, self.stage = code, stage.name
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = text.replace("\r", "\n").splitlines()[-LAST_LINES:]
        print(*(f"  | {line}" for line in lines), sep="\n", file=sys.stderr)
        super().__init__(f"stage '{stage.name}' ended with exit code {code}; its log is {log}")


def in_process(stage: Stage, log: Path) -> None:
    """Run the stage; its output goes to `log`, one line about it to stdout. Raises StageFailed.

    Ctrl-C, or SIGTERM to this process, interrupts the stage once and waits until it has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1", **stage.environment}
    print(f"[{stage.name}] ...", end="", flush=True)
    started = time.monotonic()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open(log, "a", encoding="utf-8") as out:
        out.write(f"$ {stage.command}\n")
        out.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", stage.module, *stage.arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches us alone, and the stage hears of it once
            preexec_fn=_interruptible,
        )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        print(" interrupted", flush=True)
        raise
    finally:
        end(process)
        signal.signal(signal.SIGTERM, before)
    if code:
        print(" failed", flush=True)
        raise StageFailed(stage, code, log)
    print(f" {stage.makes}, {time.monotonic() - started:.0f} s", flush=True)


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it


def end(process: subprocess.Popen) -> None:
    """Interrupt a command and wait for it; what does not end in time is killed. A no-op if it has ended."""
    for sign, patience in ((signal.SIGINT, PATIENCE), (signal.SIGTERM, 10), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if sign == signal.SIGKILL:
                os.killpg(process.pid, sign)
            else:
                process.send_signal(sign)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(patience)
