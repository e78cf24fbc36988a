"""What is to be asked, read row by row: jsonl files or a data set list (`configs/data/*.yaml`) -> Chat.

Nothing is held but a digest a prompt, so a list may be larger than memory. Every row is checked on a first
pass,
before anything is asked: a broken line is an error at the start, not after hours.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from fastmtp.cli import InputError
from fastmtp.data.mixture import DataConfig, Sampling, Source
from fastmtp.files import read_jsonl
from fastmtp.vocab.lang import detect

Rows = Callable[
    [], Iterator[tuple[str, dict]]
]  # gives ("file:line", {messages, source, ...}), anew at every call


@dataclass(frozen=True)
class Chat:
    """One prompt row. `parts[t]` are the messages handed over before answer t; `key` is a digest of what is
    asked.
    """

    key: str
    id: str
    source: str
    lang: str
    parts: list[list[dict]]
    sampling: Sampling


def turns(messages: list[dict]) -> list[list[dict]]:
    """The messages to hand over before each answer; answers that the prompt file holds are left out, to be
    redone.
    """
    parts: list[list[dict]] = [[]]
    for message in messages:
        if message["role"] == "assistant":
            parts.append([])
        else:
            parts[-1].append({"role": message["role"], "content": message["content"]})
    return [part for part in parts if part]


def file_rows(paths: list[str], split: str | None) -> Rows:
    """Rows of jsonl files with `messages` or `prompt`; those with this `split` alone, where one is given."""

    def rows() -> Iterator[tuple[str, dict]]:
        for path in paths:
            for number, row in read_jsonl(path):
                if not split or row.get("split") == split:
                    yield f"{path}:{number}", row

    return rows


def listed_rows(data: DataConfig, where: str, seed: int) -> Rows:
    """Rows of all sources of a data set list, in the form of `file_rows`. Hub data sets are fetched at the
    first call.
    """
    tables = {source.name: _table(source, where) for source in data.sources}

    def rows() -> Iterator[tuple[str, dict]]:
        for source in data.sources:
            table = tables[source.name]
            kept = (n for n, (_, row) in enumerate(table()) if _kept(source, row))
            if source.samples is not None:
                places = list(kept)
                amount = min(source.samples, len(places))
                chosen = set(random.Random(f"{seed} {source.name}").sample(places, amount))
                picked = ((place, row) for n, (place, row) in enumerate(table()) if n in chosen)
            else:
                picked = ((place, row) for place, row in table() if _kept(source, row))
            for place, row in picked:
                yield (
                    place,
                    {"source": source.name, "lang": source.lang, "messages": _messages(source, row, place)},
                )

    return rows


def _table(source: Source, where: str) -> Rows:
    if source.path:
        path = source.path
        return lambda: ((f"{path}:{number}", row) for number, row in read_jsonl(path))
    try:
        import datasets  # heavy, and only the Hub needs it
    except ImportError:
        raise InputError(
            f"{where}: source '{source.name}' needs the datasets package; pip install datasets"
        ) from None
    try:
        table = datasets.load_dataset(source.hub, source.hub_config, split=source.split)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{where}: source '{source.name}': {reason}; check 'hub' and 'split'") from None
    return lambda: ((f"{source.hub}[{n}]", row) for n, row in enumerate(table))


def _kept(source: Source, row: dict) -> bool:
    return all(row.get(column) in values for column, values in source.only.items())


def _messages(source: Source, row: dict, place: str) -> list[dict]:
    column = source.messages or source.prompt
    if column not in row:
        raise InputError(
            f"{place}: no column '{column}', which source '{source.name}' names; it has {', '.join(row)}"
        )
    if source.messages:
        return row[column]
    extra = (row.get(source.extra) or "").strip() if source.extra else ""
    return [{"role": "user", "content": row[column] + (f"\n\n{extra}" if extra else "")}]


def chats(rows: Rows, default: Sampling, sampling: dict[str, Sampling], tag: str) -> Iterator[Chat]:
    """Rows -> Chat. `tag` names the model and the way of asking; it and all that is asked make the key.

    The nth row of the same content gets a key of its own, so that there is one answer a row.
    Raises InputError for a row without a prompt.
    """
    seen: Counter[bytes] = Counter()
    empty = True
    for where, row in rows():
        empty = False
        messages = row.get("messages") or (
            [{"role": "user", "content": row["prompt"]}] if row.get("prompt") else None
        )
        parts = turns(_checked(messages, where))
        if not parts:
            raise InputError(f"{where}: no prompt; the row has answers alone")
        source = str(row.get("source") or where.rpartition("/")[2].partition(".")[0])
        chosen = sampling.get(source, default)
        text = json.dumps([tag, asdict(chosen), parts], sort_keys=True, ensure_ascii=False)
        content = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        seen[content] += 1
        key = content.hex() + (f"-{seen[content]}" if seen[content] > 1 else "")
        lang = row.get("lang") or detect(
            "\n".join(m["content"] for part in parts for m in part if m["role"] == "user")
        )
        yield Chat(key, str(row.get("id") or key), source, lang, parts, chosen)
    if empty:
        raise InputError("no prompts; check --prompts and --split")


def _checked(messages: object, where: str) -> list[dict]:
    if not messages:
        raise InputError(f"{where}: no prompt; give `messages` or a non-empty `prompt`")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{where}: `messages` must be a list of {{role, content}}; mend or remove this line")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise InputError(f"{where}: a message has the role {role!r}; expected system, user or assistant")
        if role == "assistant":
            continue
        if not isinstance(content, str) or (role == "user" and not content.strip()):
            raise InputError(f"{where}: an empty or non-text {role} message; mend or remove this line")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{where}: text that is not valid UTF-8; mend or remove it") from None
    return messages


def limited(rows: Rows, limit: int | None) -> Rows:
    """The first `limit` rows."""
    return rows if limit is None else lambda: islice(rows(), limit)
