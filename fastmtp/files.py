"""Reading what people hand us and writing what others rely on.

Inputs: JSON lines, plain or gzipped; a broken line is named by file and number. Outputs: written under a
temporary name and renamed, so that a file is either whole or absent, with a `run.json` beside it that says
how it was made.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from fastmtp.cli import InputError


def existing(path: str | Path, what: str = "file") -> Path:
    """`path` as a Path; raises InputError where nothing lies."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such {what}; check the path")
    return path


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) of a .jsonl or .jsonl.gz file; blank lines are passed over.

    Raises InputError naming the file and the line for a missing or unreadable file, a line that is not JSON,
    not UTF-8 or not an object.
    """
    path = existing(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _json_object(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:  # a folder, a false or torn gzip file, no permission
        raise InputError(f"{path}: cannot be read ({error}); give a .jsonl or .jsonl.gz file") from None


def _json_object(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); mend or remove it") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text; mend or remove it") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}; mend it")
    return row


def read_json(path: str | Path) -> dict:
    """A JSON file that holds one object. Raises InputError naming the file for anything else."""
    return _json_object(existing(path).read_bytes(), str(path))


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` (file or folder, the caller makes it); rename it there on success.

    A folder already there is replaced only if it is empty or an output of ours (`run.json`); InputError otherwise.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) and not (path / "run.json").exists():
        raise InputError(f"{path}: the folder holds other files and would be replaced; give a new one or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: str | Path, rows: Iterator[dict] | list[dict]) -> None:
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def growing(path: str | Path, config: dict, key: str = "id") -> Iterator[tuple[dict[str, dict], Callable[[dict], None]]]:
    """A jsonl output that grows row by row and survives an interruption.

    Gives (rows already there by their `key`, write). Rows go to a hidden file beside `path`, named by `config` so that
    other settings start afresh; it becomes `path` when the block ends without an error. A last line cut by a kill is
    dropped. A finished `path` whose run.json records the same config counts as done.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]
    partial = path.with_name(f".{path.name}.{tag}.partial")
    done: dict[str, dict] = {}
    record = path.with_name(path.stem + ".run.json")
    if path.exists() and record.exists() and not partial.exists():
        if json.loads(record.read_text(encoding="utf-8"))["config"] == json.loads(json.dumps(config, default=str)):
            shutil.copyfile(path, partial)
    if partial.exists():
        text = partial.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            partial.write_bytes(whole)
        done = {row[key]: row for row in map(json.loads, whole.splitlines())}
    with open(partial, "a", encoding="utf-8") as out:

        def write(row: dict) -> None:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()

        yield done, write
    os.replace(partial, path)


def state(folder: str | Path) -> str:
    """A short tag of what a model folder holds (names, sizes, times), so that results of other weights are not reused."""
    facts = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in Path(folder).iterdir() if p.is_file())
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def settings(args) -> dict:
    """A command's arguments (its `model` folder, its `prompts` file among them) and what the two hold, for `growing`."""
    return {**vars(args), "model_state": state(existing(args.model, "model folder")), "prompts_sha256": sha256(args.prompts)}


def python_path() -> str:
    """PYTHONPATH for a process that must import this package, where it is not installed too."""
    return os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def provenance(config: dict, inputs: list[str | Path] = ()) -> dict:
    """What made an output: resolved config, command, versions, git commit, hashes of the input files."""
    versions = {"python": platform.python_version()}
    for package in ("fastmtp", "torch", "transformers", "ms-swift", "sglang"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    here = Path(__file__).resolve().parent
    # `-m fastmtp.x` runs anywhere; the file's path would only tell whose machine this was.
    program = Path(sys.argv[0]).resolve()
    start = ["-m", f"{here.name}.{program.stem}"] if program.parent == here else [sys.argv[0]]
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git here, or an installed package
        asked = ["git", "-C", here, "rev-parse", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "command": shlex.join(["python", *start, *sys.argv[1:]]),
        "config": config,
        "inputs": {str(p): sha256(p) for p in map(Path, inputs) if p.is_file()},
        "versions": versions,
        "git_commit": commit,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_provenance(output: str | Path, config: dict, inputs: list[str | Path] = ()) -> None:
    """Write `run.json` into a folder output, or `NAME.run.json` beside a file output."""
    output = Path(output)
    target = output / "run.json" if output.is_dir() else output.with_name(output.stem + ".run.json")
    write_json(target, provenance(config, inputs))
