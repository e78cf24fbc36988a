"""Text to count tokens on, from files or a Hub data set, in chunks of half a megabyte, whatever the corpus's
size. A single row may have up to LONGEST bytes; a longer one is refused and never held in memory.

A row is one of: a distilled sample or training row (exact token ids, used as they are), a chat (`messages`:
the assistant's turns), a row with a text column (its answer or text), or a paragraph of a .txt file.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastmtp.cli import InputError

CHUNK = 500_000  # bytes of text: worth its way to a worker, small enough to hold two per worker
PARAGRAPH = 100_000  # longest run of .txt lines taken as one sample
LONGEST = 16 << 20  # bytes of one row: a book of five million words
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz")


class Row(NamedTuple):
    where: str  # "file:line", for messages
    content: bytes | str | dict  # a JSON line, a .txt paragraph, a parquet or data set row


class Chunk(NamedTuple):
    rows: list[Row]
    position: int  # bytes read from disk since the chunk before; 0 if unknown


class Answer(NamedTuple):
    text: str | None  # None if only the ids are known
    ids: list[int] | None  # exact token ids, used as they are; None: tokenise `text`
    closed: bool  # the model ends it with its end token (ids bring their own)


def expand(patterns: list[str]) -> list[Path]:
    """Files that the paths and glob patterns name, each once, in order; InputError if there are none."""
    paths: dict[Path, None] = {}
    for pattern in patterns:
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise InputError(f"{pattern}: no such file; check the path or pattern")
        for name in names:
            if not name.endswith(SUFFIXES):
                raise InputError(f"{name}: unknown kind of file; expected {', '.join(SUFFIXES)}")
            paths[Path(name)] = None
    return list(paths)


def file_chunks(paths: list[Path], column: str | None) -> Iterator[Chunk]:
    """Chunks of all files, in order. Raises InputError for a file that cannot be read to its end."""
    for path in paths:
        try:
            if path.suffix == ".parquet":
                yield from _parquet(path, column)
            else:
                yield from _lines(path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: damaged or cut off ({error}); fetch it again") from None


def dataset_chunks(name: str, split: str, column: str | None) -> Iterator[Chunk]:
    """Chunks of a Hub data set (or a local folder that `datasets` reads), streamed. Raises InputError if it
    cannot be had.
    """
    try:
        import datasets  # heavy, and only this source needs it
    except ImportError:
        raise InputError("--dataset needs the datasets package; pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        yield from _by_size(Row(f"{name}[{split}]:{i}", row) for i, row in enumerate(rows))
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"data set {name}, split {split}: {reason}; check --dataset and --split") from None


def answers(row: Row, column: str | None) -> list[Answer]:
    """What the model said (or would say) in a row. Raises InputError for a row that is broken or has no such
    thing.
    """
    content = row.content
    if isinstance(content, str):
        return [_answer(row, content, None, closed=False)]
    if isinstance(content, bytes):
        if len(content) > LONGEST:
            raise _too_long(row)
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise InputError(f"{row.where}: not JSON ({reason}); fix or remove this line") from None
        if not isinstance(content, dict):
            raise InputError(
                f"{row.where}: expected a JSON object, found {type(content).__name__}; fix this line"
            )
    if column in (None, "output_ids") and _is_ids(content.get("output_ids")):
        return _distilled(row, content)
    if column is None:
        column = next((name for name in ("messages", "text") if content.get(name) is not None), None)
        if column is None:
            raise InputError(
                f"{row.where}: no messages, output_ids or text; name the text with --column "
                f"(columns: {_names(content)})"
            )
    value = content.get(column)
    if isinstance(value, str):
        return [_answer(row, value, None, closed=column != "text")]
    if _is_ids(value):
        return [_answer(row, None, value, closed=False)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        turns = _assistant(row, value)
        if not turns:
            raise InputError(f"{row.where}: the chat has no assistant turn; fix or remove this row")
        return turns
    if column not in content:
        raise InputError(
            f"{row.where}: no column '{column}'; choose another --column (columns: {_names(content)})"
        )
    raise InputError(
        f"{row.where}: '{column}' is neither text, token ids nor messages; fix or remove this row"
    )


def _distilled(row: Row, content: dict) -> list[Answer]:
    """A distilled sample's own tokens: all turns that carry theirs, or else `output_ids`, the last turn's."""
    messages = content.get("messages")
    turns = _assistant(row, messages if isinstance(messages, list) else [])
    exact = [turn for turn in turns if turn.ids is not None]
    return exact or [_answer(row, turns[-1].text if turns else None, content["output_ids"], closed=False)]


def _assistant(row: Row, messages: list[dict]) -> list[Answer]:
    """The assistant's turns, in the forms that fastmtp.chat knows."""
    turns = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise InputError(f"{row.where}: a message without a role; fix or remove this row")
        if message["role"] != "assistant":
            continue
        content, ids = message.get("content"), message.get("token_ids")
        if isinstance(content, dict):
            content, ids = None, content.get("token_ids")
        if not (_is_ids(ids) or ids is None and isinstance(content, str)):
            raise InputError(
                f"{row.where}: an assistant turn has neither text nor token ids; fix or remove this row"
            )
        turns.append(_answer(row, content, ids, closed=ids is None))
    return turns


def _answer(row: Row, text: str | None, ids: list[int] | None, closed: bool) -> Answer:
    if len(text or "") > LONGEST:
        raise _too_long(row)
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:  # tokenizers would fail on it without saying where
        raise InputError(f"{row.where}: text that is not valid UTF-8; fix or remove it") from None
    return Answer(text, ids, closed)


def _names(content: dict) -> str:
    """A row's columns, as far as they fit into a message."""
    names = ", ".join(map(str, content))
    return names if len(names) < 200 else names[:200] + "..."


def _too_long(row: Row) -> InputError:
    return InputError(f"{row.where}: longer than {LONGEST >> 20} MB; split or remove this row")


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(i) is int for i in value)


def _lines(path: Path) -> Iterator[Chunk]:
    """A text file's rows: JSON lines as bytes, so that parsing and its errors belong to whoever counts."""
    with open(path, "rb") as raw:
        lines = gzip.open(raw) if path.suffix == ".gz" else raw
        rows = _paragraphs(path, lines) if ".txt" in path.suffixes else _json_lines(path, lines)
        before = 0
        for chunk in _by_size(rows):
            position = raw.tell()
            yield Chunk(chunk.rows, position - before)
            before = position


def _json_lines(path: Path, lines: BinaryIO) -> Iterator[Row]:
    for number in itertools.count(1):
        line = lines.readline(LONGEST + 1)
        if not line:
            return
        rest = line
        while len(rest) > LONGEST and not rest.endswith(b"\n"):  # what is left of it is passed over in pieces
            rest = lines.readline(LONGEST + 1)
        if line.strip():
            yield Row(f"{path}:{number}", line)


def _paragraphs(path: Path, lines: BinaryIO) -> Iterator[Row]:
    """Lines up to and with the blank ones after them: cutting elsewhere would change how newlines are
    tokenised. A line longer than PARAGRAPH comes in several pieces.
    """
    part: list[str] = []
    length = 0
    decoder = codecs.getincrementaldecoder("utf-8")(
        "surrogateescape"
    )  # bytes that are no UTF-8: see `answers`
    for number in itertools.count(1):
        line = lines.readline(PARAGRAPH)
        if not line:
            break
        text = decoder.decode(line)
        text = text.removeprefix("\ufeff") if number == 1 else text
        if part and (text.strip() and not part[-1].strip() or length > PARAGRAPH):
            yield Row(f"{path}:{number - len(part)}", "".join(part))
            part, length = [], 0
        part.append(text)
        length += len(text)
    part.append(decoder.decode(b"", final=True))
    if "".join(part).strip():
        yield Row(f"{path}:{number + 1 - len(part)}", "".join(part))


def _parquet(path: Path, column: str | None) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: parquet needs the pyarrow package; pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [
            name
            for name in ([column] if column else ("messages", "output_ids", "text"))
            if name in table.schema_arrow.names
        ]
        if not columns:
            missing = f"no column '{column}'" if column else "no messages, output_ids or text"
            raise InputError(
                f"{path}: {missing}; choose a --column (columns: {', '.join(table.schema_arrow.names)})"
            )
        groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
        row_bytes = sum(group.total_byte_size for group in groups) / max(1, table.metadata.num_rows)
        at_once = max(1, min(256, int(8 * CHUNK / max(1, row_bytes))))
        batches = table.iter_batches(batch_size=at_once, columns=columns)
        rows = (row for batch in batches for row in batch.to_pylist())
        for chunk in _by_size(Row(f"{path}:row {i}", row) for i, row in enumerate(rows)):
            yield Chunk(chunk.rows, path.stat().st_size * len(chunk.rows) // table.metadata.num_rows)
    except InputError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a parquet file that can be read ({reason}); fetch it again") from None


def _by_size(rows: Iterable[Row]) -> Iterator[Chunk]:
    part: list[Row] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row.content) if not isinstance(row.content, dict) else len(str(row.content))
        if size >= CHUNK:
            yield Chunk(part, 0)
            part, size = [], 0
    if part:
        yield Chunk(part, 0)
