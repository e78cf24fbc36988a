"""One stage of a pipeline is one command. A finished stage is reused while nothing that it depends on has
changed.

What a stage depends on is its fingerprint: the command, the content of the files it reads, and what else the
pipeline adds. The log of a pipeline (`stages.json`) holds it for every stage, from before the stage begins,
with the content of what it made. A stage that was interrupted runs again with the same command, and continues
by itself where it can.
"""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastmtp import files
from fastmtp.fingerprint import content, differences, fingerprint
from fastmtp.inputs import read_json, resource


@dataclass(frozen=True)
class Stage:
    """`python -m MODULE WORDS`.

    words, how: arguments as a shell writes them; `how` are those that change how fast it goes and not what
    comes out. makes: the output. reads: files and folders. keeps: what of its output the command itself may
    use again, so that it is not removed before it runs: "nothing", "all", or "all of another command" on the
    same inputs.
    """

    name: str
    module: str
    words: str
    makes: str
    reads: tuple[str, ...]
    how: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    keeps: str = "nothing"

    @property
    def arguments(self) -> list[str]:
        return [*shlex.split(self.words), *shlex.split(self.how)]

    @property
    def command(self) -> str:
        """As a user would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(["python", "-m", self.module, *self.arguments])])


def facts_of(
    stage: Stage, settings: Mapping[str, object], places: Mapping[str, Path] | None = None
) -> dict[str, object]:
    """All that a stage's result depends on; its inputs must be there. places: where some of them lie."""
    inputs = {name: (places or {}).get(name) or resource(name) for name in stage.reads}
    return fingerprint(inputs, {"command": [stage.module, *shlex.split(stage.words)], **settings})


def remove(path: Path) -> None:
    """Remove a stage's output and what an interrupted run left of it. InputError if it is not ours."""
    files.check_output(path)
    left = re.compile(rf"\.{re.escape(path.name)}\.(([0-9a-f]{{12}}\.)?partial|\d+\.(tmp|old))")
    for old in (path, *(p for p in path.parent.glob(".*") if left.fullmatch(p.name))):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)


def read_log(record: Path) -> dict:
    """What earlier runs did, by stage; what another version wrote in another form counts as nothing done."""
    log = read_json(record) if record.exists() else {}
    return {
        name: entry
        for name, entry in log.items()
        if isinstance(entry, dict)
        and isinstance(entry.get("facts"), dict)
        and isinstance(entry.get("spent"), float)
    }


def changes(entry: dict, facts: dict[str, object], made: Path) -> list[str]:
    """Why what an earlier run made, or began to make, cannot be used; [] if it can."""
    changed = differences(entry.get("facts", {}), facts)
    if changed or entry.get("seconds") is None:
        return changed
    if not made.exists():
        return [f"{made} is gone"]
    return [] if content(made) == entry.get("made") else [f"{made}: other content than this stage made"]


def perform(
    stage: Stage,
    facts: dict[str, object],
    log: dict,
    record: Path,
    execute: Callable[[Stage], None],
) -> None:
    """Run one stage unless `log` (kept in the file `record`) says that it is done with these facts.

    `execute` runs the stage's command and raises if it fails.
    """
    made, entry = Path(stage.makes), log.get(stage.name)
    changed = changes(entry, facts, made) if entry else ["new"]
    if not changed and entry["seconds"] is not None:
        print(f"[{stage.name}] reused {made}", flush=True)
        return
    if entry and changed:
        print(f"[{stage.name}] made again: {'; '.join(changed)}", flush=True)
    if changed:
        before = entry["facts"] if entry else {}
        same = all(before.get(name) == value for name, value in facts.items() if name != "command")
        if stage.keeps == "nothing" or stage.keeps == "all of another command" and not same:
            remove(made)
        entry = log[stage.name] = {"command": stage.command, "facts": facts, "spent": 0.0, "seconds": None}
        files.write_json(record, log)  # a run killed from here on continues
    started, done = time.perf_counter(), False
    try:
        execute(stage)
        done = True
    finally:
        entry["spent"] += time.perf_counter() - started
        if done:
            entry |= {"seconds": round(entry["spent"], 1), "made": content(made)}
        files.write_json(record, log)
