"""Reading what people hand us.

JSON and JSON lines, plain or gzipped: a broken line is named by file and number. Inputs that come with the
project (recipes, prompts, token maps) are found from any folder.
"""

from __future__ import annotations

import gzip
import importlib.resources
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastmtp.checkout import checkout
from fastmtp.cli import InputError

LONGEST_LINE = 64 << 20  # bytes; a question with all its hidden tests may take some of them
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def existing(path: str | Path, what: str = "file") -> Path:
    """`path` as a Path; raises InputError if there is none."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such {what}; check the path")
    return path


SHIPPED = ("configs", "examples", "vocab")  # folders of the checkout that an installed package carries too


def resource(path: str | Path) -> Path:
    """`path` as it is if it exists, else the file or folder of this name that comes with the project.

    Shipped are configs/, examples/, vocab/ and the package's own fastmtp/; other paths are left as they are.
    """
    path = Path(path)
    package = importlib.resources.files("fastmtp")
    if path.exists() or path.is_absolute():
        return path
    if path.parts[:1] == ("fastmtp",):
        shipped = Path(str(package.joinpath(*path.parts[1:])))
    elif path.parts[:1] and path.parts[0] in SHIPPED:
        shipped = (checkout() or Path(str(package.joinpath("resources")))) / path
    else:
        return path
    return shipped if shipped.exists() else path


def shipped(path: str) -> str:
    """`resource` for argparse's `type`: an input such as configs/curate.yaml is found from any folder."""
    return str(resource(path)) if path else path


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) of a .jsonl or .jsonl.gz file; blank lines are passed over.

    Raises InputError naming the file and the line for a missing or unreadable file, a line that is not JSON,
    not UTF-8 or not an object.
    """
    for number, line in numbered_lines(path):
        yield number, json_object(line, f"{path}:{number}")


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of the lines of a file, plain or gzipped; blank ones are passed over.

    Raises InputError for a file that cannot be read and for a line of more than LONGEST_LINE bytes, which is
    never held in memory.
    """
    path = existing(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number in itertools.count(1):
                line = lines.readline(LONGEST_LINE + 1)
                if len(line) > LONGEST_LINE:
                    size = LONGEST_LINE >> 20
                    raise InputError(f"{path}:{number}: longer than {size} MB; split or remove this line")
                if not line:
                    return
                if line.strip():
                    yield number, line
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give a .jsonl or .jsonl.gz file") from None
    except (OSError, EOFError, zlib.error) as error:  # a false or torn gzip file, no permission
        raise InputError(f"{path}: cannot be read ({error}); give a .jsonl or .jsonl.gz file") from None


def json_object(line: bytes, place: str) -> dict:
    """One line (or file) of UTF-8 that holds a JSON object. Raises InputError, starting with `place`."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if HALF_PAIR.search(line):  # the escaped half of a character: no UTF-8 file can hold it again
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error.msg}); fix or remove it") from None
    except UnicodeDecodeError:
        raise InputError(f"{place}: not UTF-8 text; fix or remove it") from None
    except UnicodeEncodeError:
        raise InputError(f"{place}: text that is not valid UTF-8; fix or remove it") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise InputError(f"{place}: JSON that is too large or too deeply nested; remove it") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, not {type(row).__name__}; fix it")
    return row


def read_json(path: str | Path) -> dict:
    """A JSON file that holds one object. Raises InputError naming the file for anything else."""
    return json_object(existing(path).read_bytes(), str(path))


def whole_numbers(option: str, text: str) -> list[int]:
    """ "1,3,5" -> [1, 3, 5]. InputError, naming the option, for anything else."""
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise InputError(f"{option} {text}: no list of whole numbers such as 1,3,5") from None
