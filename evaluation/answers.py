"""An answer file: one line per finished question, and beside it what its answers depend on.

`NAME.jsonl` grows line by line, so that a kill loses only the questions in flight. `NAME.jsonl.run.json`
holds the fingerprint under which the first line was written; answers made under another are never mixed in.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from evaluation.backends import Turn
from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.fingerprint import differences, digest
from fastmtp.inputs import read_jsonl


class Answers:
    """Answers of one arm to one task, by question key. `asked` counts those added by this object.

    Raises InputError if the file is not ours, is written by another process, or was made under another
    fingerprint, with what differs in words; `option` names the argument to change.
    """

    def __init__(self, path: Path, depends: dict[str, object], option: str):
        self.path, self.settings, self.asked = path, digest(depends), 0
        if path.exists():
            files.check_output(path)
            before = (files.read_record(files.record_of(path)) or {}).get("fingerprint")
            if not isinstance(before, dict):
                raise InputError(f"{path}: nothing says what made its answers; give another {option}")
            changed = differences(before, depends)
            if changed:
                words = "; ".join(changed)
                raise InputError(f"{path}: made under other settings ({words}); give another {option}")
        files.claim(path, depends=depends)
        self.rows = self._read() if path.exists() else {}

    def _read(self) -> dict[str, dict]:
        """Question key -> answer. What a kill left of a last line is removed."""
        text = self.path.read_bytes()
        if text and not text.endswith(b"\n"):
            os.truncate(self.path, text.rfind(b"\n") + 1)
        rows = {}
        for number, row in read_jsonl(self.path):
            key = row.get("question")
            ours = row.get("settings") == self.settings and isinstance(row.get("turns"), list)
            if not ours or not isinstance(key, str):
                raise InputError(
                    f"{self.path}:{number}: not an answer of this run; remove the line or the file"
                )
            rows[key] = row
        return rows

    def add(self, key: str, turns: list[Turn]) -> None:
        """Keep the answer to a question, in memory and on the disk."""
        row = {"question": key, "settings": self.settings, "turns": [asdict(turn) for turn in turns]}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with files.disk_errors(self.path), open(self.path, "a", encoding="utf-8") as out:
            out.write(line)
        self.rows[key] = row
        self.asked += 1

    def to(self, keys: list[str]) -> list[dict]:
        """The answers to these questions, each once."""
        return [self.rows[key] for key in dict.fromkeys(keys)]

    def close(self) -> None:
        """Let other processes write the file."""
        files.release(self.path)
