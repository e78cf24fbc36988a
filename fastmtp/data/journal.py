"""Where answers are kept while they come in: nothing is asked twice, nothing lost, whenever the process is
killed.

Each answer is one line of `.NAME.jsonl.partial` beside the output, written in one call; a last line that a
kill cut off is dropped and asked again. The partial file becomes the output when every prompt has its answer
or its reason in `NAME.failed.jsonl`, whose prompts the next run of the same command tries again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

from fastmtp.cli import InputError
from fastmtp.data.prompts import Chat
from fastmtp.files import atomic, claim


def sample(chat: Chat, messages: list[dict], prompt_ids: list[int], eos_ids: set[int]) -> dict:
    """One output line (the contract in docs/formats.md). `prompt_ids` are those of the last answer."""
    answers = [message["token_ids"] for message in messages if message["role"] == "assistant"]
    return {
        "id": chat.id,
        "source": chat.source,
        "lang": chat.lang,
        "messages": messages,
        "prompt_ids": prompt_ids,
        "output_ids": answers[-1],
        "finish": "stop"
        if all(ids[-1] in eos_ids for ids in answers)
        else "length",  # one cut answer spoils the chat
        "key": chat.key,
    }


class Journal:
    """`with Journal("distilled.jsonl", keys) as journal:`; `done` holds the keys already answered.

    Raises InputError if the disk is full, after which what was written is kept, and if the output or its list
    of failures is not ours.
    """

    def __init__(self, out: str | Path, asked: set[str]):
        self.out, self.asked = Path(out), asked
        self.partial = self.out.with_name(f".{self.out.name}.partial")
        self.failures = self.out.with_name(self.out.name.removesuffix(".jsonl") + ".failed.jsonl")
        self.done: set[str] = set()
        self.failed = 0
        self.tokens = 0  # written by this process
        self.first_reason = ""

    def __enter__(self) -> Journal:
        claim(self.out)
        self._check_failures()
        try:
            if self.out.exists() and not self.partial.exists():
                with atomic(self.partial) as temporary:
                    shutil.copyfile(self.out, temporary)
            self.stale = self._load() if self.partial.exists() else 0
            asked, left = len(self.asked) - len(self.done), self.stale
            gone = f", {left} to other prompts or settings left out" if left else ""
            if self.done or left:
                print(f"{self.out}: {asked} asked, {len(self.done)} kept{gone}", file=sys.stderr)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self.file = os.open(self.partial, flags, 0o644)
            self.failed_file = os.open(self.failures, flags | os.O_TRUNC, 0o644)
        except OSError as error:
            raise self._full(error) from None
        return self

    def __exit__(self, kind, *_: object) -> None:
        os.close(self.file)
        os.close(self.failed_file)
        if not self.failed:
            self.failures.unlink(missing_ok=True)
        if kind is None:
            try:
                self._finish()
            except OSError as error:
                raise self._full(error) from None

    def _check_failures(self) -> None:
        """InputError if a file of somebody else's would be cut."""
        if not self.failures.exists() or not self.failures.stat().st_size:
            return
        with open(self.failures, "rb") as stream:
            try:
                ours = {"key", "reason"} <= json.loads(stream.readline()).keys()
            except (ValueError, AttributeError):
                ours = False
        if not ours:
            raise InputError(f"{self.failures}: not a list of failures of this command; move it elsewhere")

    def _load(self) -> int:
        """Take over the keys of whole lines and cut off the rest; how many are no longer asked for."""
        stale, end = 0, 0
        with open(self.partial, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    key = json.loads(line).get("key")
                except (ValueError, AttributeError):
                    raise InputError(
                        f"{self.partial}: no answer at byte {end - len(line)}; fix or remove the file"
                    ) from None
                if key in self.asked and key not in self.done:
                    self.done.add(key)
                else:
                    stale += 1
        os.truncate(self.partial, end)
        return stale

    def write(self, sample: dict) -> None:
        """Keep one finished sample, whose "key" is in `asked`."""
        self._append(self.file, sample)
        self.done.add(sample["key"])
        self.tokens += sum(len(m.get("token_ids", ())) for m in sample["messages"])

    def fail(self, chat: Chat, reason: str) -> None:
        """Record a prompt that got no answer."""
        reason = reason.encode("utf-8", "replace").decode("utf-8")
        self.failed += 1
        self.first_reason = self.first_reason or f"prompt '{chat.id}': {reason}"
        messages = [message for part in chat.parts for message in part]
        row = {"id": chat.id, "source": chat.source, "lang": chat.lang, "messages": messages}
        self._append(self.failed_file, row | {"key": chat.key, "reason": reason})

    def _append(self, file: int, row: dict) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            while line:  # a disk that fills up takes a part first
                line = line[os.write(file, line) :]
        except OSError as error:
            raise self._full(error) from None

    def _finish(self) -> None:
        if len(self.done) + self.failed < len(self.asked):
            return  # stopped early: the rest is still to come
        if self.failed and not self.done:
            self.partial.unlink()
            others = f" (and {self.failed - 1} more failed)" if self.failed > 1 else ""
            raise InputError(f"{self.first_reason}{others}; {self.failures} lists all of them")
        if not self.stale:
            os.replace(self.partial, self.out)
            return
        left = set(self.done)
        with atomic(self.out) as temporary, open(self.partial, "rb") as lines, open(temporary, "wb") as out:
            for line in lines:
                key = json.loads(line).get("key")
                if key in left:
                    left.remove(key)
                    out.write(line)
        self.partial.unlink()

    def _full(self, error: OSError) -> Exception:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        return InputError(
            f"{self.out}: the disk is full; {len(self.done)} answers are kept in {self.partial}: free some "
            "space and run the same command again"
        )
