"""What to ask, read row by row: jsonl files or a data set list (`configs/data/*.yaml`) -> Chat.

Nothing is held but a digest per prompt, so a list may be larger than memory. Every row is checked on a first
pass, before anything is asked: a broken line is an error at the start, not after hours.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from fastmtp.cli import InputError
from fastmtp.data.messages import refuse_unread, row_messages, text_field
from fastmtp.data.mixture import quotas
from fastmtp.data.sources import DataConfig, Sampling, Source
from fastmtp.inputs import read_jsonl, resource
from fastmtp.vocab.lang import detect

# Gives ("file:line", {messages, source, ...}), anew at every call.
Rows = Callable[[], Iterator[tuple[str, dict]]]


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
    """Rows of jsonl files with `messages` or `prompt`; if `split` is given, those of this `split` alone."""

    def rows() -> Iterator[tuple[str, dict]]:
        for path in paths:
            for number, row in read_jsonl(path):
                if not split or row.get("split") == split:
                    yield f"{path}:{number}", row

    return rows


def read_prompts(path: str | Path, split: str | None = None, limit: int | None = None) -> list[dict]:
    """Rows of one jsonl file, each with an `id` of its own and checked `messages`.

    Raises InputError for a row without a prompt, an id that was there before, no row at all, or a limit below
    1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, not {limit}")
    prompts, seen = [], set()
    for place, row in limited(file_rows([str(path)], split), limit)():
        messages = row_messages(row, place)
        if messages[-1]["role"] == "assistant":
            raise InputError(f"{place}: the last message is an answer, not a prompt; remove it")
        name = text_field(row, "id", place) or f"line-{place.rpartition(':')[2]}"
        if name in seen:
            raise InputError(f"{place}: the id '{name}' was there before; give every prompt its own")
        seen.add(name)
        labels = {label: text_field(row, label, place) or "" for label in ("source", "lang")}
        prompts.append({**row, **labels, "messages": messages, "id": name})
    if not prompts:
        raise InputError(
            f"{path}: no prompts" + (f" with split '{split}'" if split else "") + "; check the file"
        )
    return prompts


def listed_rows(data: DataConfig, path: str, seed: int, limit: int | None = None) -> Rows:
    """Rows of all sources of a data set list, in the form of `file_rows`. Hub data sets are fetched at the
    first call.

    limit: take so many at random, by the list's shares (`mixture.quotas`). A larger one takes these and more.
    """
    tables = {source.name: _table(source, path) for source in data.sources}

    def rows() -> Iterator[tuple[str, dict]]:
        takes = _takes(data, tables, limit)
        for source in data.sources:
            chosen = None
            if source.name in takes:
                count, amount = takes[source.name]
                order = random.Random(f"{seed} {source.name}").sample(range(count), count)
                chosen = set(order[:amount])
            kept = ((place, row) for place, row in tables[source.name]() if _kept(source, row))
            for number, (place, row) in enumerate(kept):
                if chosen is None or number in chosen:
                    messages = _messages(source, row, place)
                    yield place, {"source": source.name, "lang": source.lang, "messages": messages}

    return rows


def _takes(data: DataConfig, tables: dict[str, Rows], limit: int | None) -> dict[str, tuple[int, int]]:
    """Source -> (rows it has, rows to take), of those that do not give all."""
    counts = {
        source.name: sum(_kept(source, row) for _, row in tables[source.name]())
        for source in data.sources
        if limit is not None or source.samples is not None
    }
    most = {source.name: source.samples for source in data.sources if source.samples is not None}
    takes = {name: min(count, most.get(name, count)) for name, count in counts.items()}
    if limit is not None:
        takes = quotas(data, takes, limit)
    return {name: (count, takes[name]) for name, count in counts.items()}


def _table(source: Source, listed_in: str) -> Rows:
    if source.path:
        path = resource(source.path)
        return lambda: ((f"{path}:{number}", row) for number, row in read_jsonl(path))
    try:
        import datasets  # heavy, and only the Hub needs it
    except ImportError:
        raise InputError(
            f"{listed_in}: source '{source.name}' needs the datasets package; pip install datasets"
        ) from None
    try:
        table = datasets.load_dataset(source.hub, source.hub_config, split=source.split)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{listed_in}: source '{source.name}': {reason}; check 'hub' and 'split'") from None
    return lambda: ((f"{source.hub}[{n}]", row) for n, row in enumerate(table))


def _kept(source: Source, row: dict) -> bool:
    return all(row.get(column) in values for column, values in source.only.items())


def _column(row: dict, column: str, source: Source, place: str) -> object:
    if column not in row:
        raise InputError(
            f"{place}: no column '{column}', which source '{source.name}' names; it has {', '.join(row)}"
        )
    return row[column]


def _messages(source: Source, row: dict, place: str) -> object:
    """What a row of a data set asks, still unchecked if the row has `messages` of its own."""
    if source.messages:
        refuse_unread(row, place)
        return _column(row, source.messages, source, place)
    texts = [_column(row, source.prompt, source, place)]
    if source.extra and row.get(source.extra) is not None:
        texts.append(row[source.extra])
    for column, text in zip((source.prompt, source.extra), texts, strict=False):
        if not isinstance(text, str):
            raise InputError(f"{place}: column '{column}' must hold a text, not {text!r:.40}; fix this row")
    content = "\n\n".join([texts[0], *(text.strip() for text in texts[1:] if text.strip())])
    return [{"role": "user", "content": content}]


def chats(rows: Rows, default: Sampling, sampling: dict[str, Sampling], tag: str) -> Iterator[Chat]:
    """Rows -> Chat. `tag` names the model and the way of asking; it and all that is asked make the key.

    The nth row of the same content gets a key of its own, so that there is one answer per row.
    Raises InputError for a row without a prompt.
    """
    seen: Counter[bytes] = Counter()
    for place, row in rows():
        parts = turns(row_messages(row, place))
        if not parts:
            raise InputError(f"{place}: no prompt; the row has answers alone")
        source = text_field(row, "source", place) or place.rpartition("/")[2].partition(".")[0]
        chosen = sampling.get(source, default)
        text = json.dumps([tag, asdict(chosen), parts], sort_keys=True, ensure_ascii=False)
        content = hashlib.blake2b(text.encode("utf-8"), digest_size=12).digest()
        seen[content] += 1
        key = content.hex() + (f"-{seen[content]}" if seen[content] > 1 else "")
        lang = text_field(row, "lang", place) or detect(
            "\n".join(m["content"] for part in parts for m in part if m["role"] == "user")
        )
        yield Chat(key, text_field(row, "id", place) or key, source, lang, parts, chosen)


def limited(rows: Rows, limit: int | None) -> Rows:
    """The first `limit` rows."""
    return rows if limit is None else lambda: islice(rows(), limit)
