"""Writing what others rely on.

Every output is written under a temporary name and renamed, so that a file is either whole or absent. Its
record (`run.json` in a folder, `NAME.run.json` beside a file) says how it was made and that it is ours.
Nothing without such a record is ever replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastmtp import fingerprint, leftovers
from fastmtp.checkout import command_line, git_state
from fastmtp.cli import InputError, before_refusal


def record_of(output: str | Path) -> Path:
    """Where an output's provenance is kept: `run.json` in a folder, `NAME.run.json` beside a file."""
    output = Path(output)
    return output / "run.json" if output.is_dir() else output.with_name(output.name + ".run.json")


def read_record(path: Path) -> dict | None:
    """A provenance file of ours; None if there is none, or one of another kind."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(record, dict) and isinstance(record.get("command"), str)
    # `command` alone is a word that other tools' records use too.
    return record if ours and (isinstance(record.get("others"), list) or "versions" in record) else None


def is_ours(path: Path) -> bool:
    """Whether this project wrote `path`: its own record says so, or that of a folder around it.

    A folder's record names what was there before us (`others`); those stay somebody else's.
    """
    if read_record(record_of(path)) is not None:
        return True
    for folder in list(path.absolute().parents)[:4]:
        record = read_record(folder / "run.json")
        if record is not None:
            return path.absolute().relative_to(folder).parts[0] not in record.get("others", [])
    return False


def check_output(path: str | Path) -> None:
    """InputError if output `path`, a file or a whole folder, would replace something that is not ours."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_ours(path):
        what = "the folder holds other files" if path.is_dir() else "the file was not written by this project"
        raise InputError(f"{path}: {what} and would be replaced; give another path or remove it")
    if path.is_dir():
        files = (read_record(path / "run.json") or {}).get("files")
        known = (*(files or ()), fingerprint.CACHE, fingerprint.CACHE + ".tmp")
        added = [p.name for p in path.iterdir() if files and p.name not in known]
        if added:
            raise InputError(
                f"{path}: {min(added)} in it was not written by this project; move it elsewhere first"
            )


_claimed: dict[Path, int] = {}  # records that this process holds open and locked, until it ends
# Those that it wrote first: their output, and whether that is a new folder.
_new: dict[Path, tuple[Path, bool]] = {}


def claim(output: str | Path, folder: bool = False, depends: dict[str, object] | None = None) -> None:
    """Say that this process writes `output`, before any work is done; keep other processes away from it.

    A file that is not ours stays untouched. With `folder`, a folder that holds somebody's files is shared,
    and theirs are never replaced. (A folder that is written whole needs `check_output` alone.) `depends`, the
    fingerprint of a file that grows, is recorded at once if the file is not there yet. Raises InputError for
    an output that is not ours or that another process is writing.
    """
    output = Path(output)
    new_folder = folder and not output.exists()
    if folder:
        output.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = record_of(output)
    if record.absolute() in _claimed:
        return
    if not folder:
        check_output(output)
        if output.is_file() and read_record(record) is None:  # somebody's file in a folder of ours
            raise InputError(f"{output}: the file was not written by this command; give another --out")
    if record.exists() and record.stat().st_size and read_record(record) is None:
        raise InputError(f"{record}: not a record of this project; give another --out")
    handle = os.open(record, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"{output}: another process is writing it; wait for it or give another --out"
        ) from None
    size = os.fstat(handle).st_size
    known = read_record(record) if folder else None
    gone = {name for name in (known or {}).get("others", []) if not (output / name).exists()}
    if gone:  # their owner took them away: what comes under these names now is ours
        known["others"] = [name for name in known["others"] if name not in gone]
        os.pwrite(handle, json.dumps(known).encode().ljust(size), 0)
    if not size or (depends is not None and not output.exists()):
        others = sorted(p.name for p in output.iterdir() if p != record) if folder else []
        facts = {"command": command_line(), "others": others}
        with disk_errors(record):
            os.truncate(handle, 0)
            os.write(
                handle, json.dumps(facts | ({} if depends is None else {"fingerprint": depends})).encode()
            )
    if not size:
        _new[record.absolute()] = output.absolute(), new_folder
    _claimed[record.absolute()] = handle


def check_apart(output: str | Path, *inputs: str | Path | None) -> None:
    """InputError if an output is one of the inputs, under whatever name: it would be replaced."""
    for path in filter(None, inputs):
        if Path(output).exists() and Path(path).exists() and os.path.samefile(output, path):
            raise InputError(f"{output}: is an input of this command too; give another --out")


def release(output: str | Path) -> None:
    """Let other processes write `output` again; a no-op if it is not claimed."""
    record = record_of(output).absolute()
    _new.pop(record, None)
    handle = _claimed.pop(record, None)
    if handle is not None:
        os.close(handle)


def withdraw() -> None:
    """Take back this process's claims on outputs that never came to be: what is refused leaves no record."""
    for record, (output, new_folder) in list(_new.items()):
        if not record.exists():
            continue
        there = [p.name for p in record.parent.iterdir() if p != record]
        if record.parent != output:  # a file: itself, and what `growing` has of it
            there = [name for name in there if name == output.name or name.startswith(f".{output.name}.")]
        if not there:
            record.unlink()
            if new_folder:
                output.rmdir()
            os.close(_claimed.pop(record))
            del _new[record]


before_refusal.append(withdraw)


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` (file or folder, the caller makes it); rename it there on success.

    What is there already is replaced only if it is ours (`check_output`). Raises InputError otherwise, and if
    the disk is full, after which nothing is left behind. What a killed run left behind is removed first.
    """
    path = Path(path)
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    leftovers.clear(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            yield temporary
            if temporary.is_dir() and path.is_dir():
                replace_folder(temporary, path)
            else:
                os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def replace_folder(new: Path, old: Path) -> None:
    """Put folder `new` in the place of `old`. A kill in between leaves both, `old` under a hidden name."""
    aside = old.with_name(f".{old.name}.{os.getpid()}.old")
    os.rename(old, aside)
    os.rename(new, old)
    shutil.rmtree(aside)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """InputError in one line if the disk is full while `path` is written, whichever library notices it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_full(error):
            raise full(path) from None
        raise


def full(path: str | Path) -> InputError:
    return InputError(f"{path}: the disk is full; free some space and run the same command again")


def is_full(error: BaseException) -> bool:
    """Whether a full disk is behind an error, whichever library raised it."""
    reasons = [error, error.__cause__, error.__context__]
    known = any(isinstance(r, OSError) and r.errno in (errno.ENOSPC, errno.EDQUOT) for r in reasons)
    return known or "No space left on device" in str(error) or "os error 28" in str(error)


def write_json(path: str | Path, value: object) -> None:
    with atomic(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def write_jsonl(path: str | Path, rows: Iterator[dict] | list[dict]) -> None:
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def growing(
    path: str | Path, facts: dict[str, object], key: str = "id"
) -> Iterator[tuple[dict[str, dict], Callable[[dict], None]]]:
    """A jsonl output that grows row by row and survives an interruption.

    facts: the fingerprint of what its rows depend on. Gives (rows already there by their `key`, write). Rows
    go to a hidden file beside `path`, named by `facts` so that other settings start afresh; it becomes `path`
    when the block ends without an error. A last line cut by a kill is dropped. A finished `path` whose record
    has the same fingerprint counts as done; a difference is said by name.
    """
    path = Path(path)
    claim(path)
    partial = path.with_name(f".{path.name}.{fingerprint.digest(facts)[:12]}.partial")
    record = read_record(record_of(path)) or {}
    if path.exists() and not partial.exists():
        before = record.get("fingerprint") or {}
        changed = fingerprint.differences(before, facts)
        if not changed:
            with atomic(partial) as temporary:
                shutil.copyfile(path, temporary)
        elif before:
            print(f"{path}: made again, because something changed: {'; '.join(changed)}", file=sys.stderr)
    done = _whole_rows(partial, key) if partial.exists() else {}
    if done:
        print(f"{path}: {len(done)} rows kept", file=sys.stderr)
    with disk_errors(path), open(partial, "a", encoding="utf-8") as out:

        def write(row: dict) -> None:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()

        yield done, write
    # Until the record speaks of the new rows, the partial file is what a later run goes by.
    with atomic(path) as temporary:
        try:
            os.link(partial, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(partial, temporary)
    _rewrite(record_of(path), {"command": command_line(), "others": [], "fingerprint": facts})
    partial.unlink()


def _whole_rows(partial: Path, key: str) -> dict[str, dict]:
    """Rows of a file that a kill may have cut short; what is left of a cut line is removed."""
    text = partial.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(partial, len(whole))
    return {row[key]: row for row in map(json.loads, whole.splitlines())}


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def provenance(
    config: dict, inputs: Sequence[str | Path] = (), facts: dict[str, object] | None = None
) -> dict:
    """What made an output: command, resolved config, hashes of the input files, versions, git commit; `facts`
    is the fingerprint by which a later run knows whether it may keep the output.
    """
    versions = {"python": platform.python_version()}
    for package in ("fastmtp", "torch", "transformers", "ms-swift", "sglang", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": command_line(),
        "config": config,
        **({"fingerprint": facts} if facts is not None else {}),
        "inputs": {str(p): sha256(p) for p in map(Path, inputs) if p.is_file()},
        "versions": versions,
        **git_state(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_provenance(
    output: str | Path,
    config: dict,
    inputs: Sequence[str | Path] = (),
    facts: dict[str, object] | None = None,
) -> None:
    """Write the record of a finished output (see `record_of`); whoever claimed it lets go."""
    output = Path(output)
    record = record_of(output)
    others = (read_record(record) or {}).get("others", [])
    content = provenance(config, inputs, facts) | ({"others": others} if others else {})
    if output.is_dir():
        content["files"] = sorted({*(p.name for p in output.iterdir()), record.name} - {*others})
    if record.exists() and read_record(record) is None and record.stat().st_size:
        raise InputError(f"{record}: not a record of this project; give another --out")
    _rewrite(record, content)
    release(output)


def _rewrite(record: Path, content: dict) -> None:
    leftovers.clear(record)
    temporary = record.with_name(f".{record.name}.{os.getpid()}.tmp")
    with disk_errors(record):
        try:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, record)
        finally:
            temporary.unlink(missing_ok=True)
