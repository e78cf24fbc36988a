"""Rows of any shape through distill and curate: never a traceback, never a row lost without a count."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmtp import curate, distill, files
from fastmtp.cli import InputError
from fastmtp.data import converse, curate_report
from fastmtp.data import servers as distill_servers
from fastmtp.inputs import read_jsonl

TEXT = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    ["", "x", "\ud83d", "\udc00"]
)
IDS = st.lists(st.integers(-2, 320) | st.floats() | st.booleans() | TEXT, max_size=4)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLE = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE | ANYTHING, "content": TEXT | ANYTHING},
    optional={"token_ids": IDS | ANYTHING, "tool_calls": ANYTHING, "name": TEXT},
)
GOOD = st.builds(
    lambda question, answer: [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "token_ids": [5, 6, 2]},
    ],
    st.sampled_from(["what is two?", "who?", "2+2"]),
    st.sampled_from(["it is four", "", "a b"]),
)
ROW = st.fixed_dictionaries(
    {"messages": GOOD | st.lists(MESSAGE, max_size=3) | ANYTHING},
    optional={
        "prompt": TEXT | ANYTHING,
        "id": ANYTHING,
        "source": TEXT | ANYTHING,
        "lang": TEXT | ANYTHING,
        "finish": st.sampled_from(["stop", "length"]) | ANYTHING,
        "prompt_ids": IDS | ANYTHING,
        "output_ids": st.just([5, 6, 2]) | IDS | ANYTHING,
        "tools": ANYTHING,
    },
)
LINE = st.builds(json.dumps, ROW) | st.builds(json.dumps, ANYTHING) | TEXT.map(lambda t: t.replace("\n", " "))
FAST = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def one_line(error: InputError) -> None:
    text = str(error)
    text.encode("utf-8")
    assert "\n" not in text and text


def written(folder: str, lines: list[str]) -> tuple[Path, int]:
    """The file of these lines, and how many of them hold something."""
    path = Path(folder) / "in.jsonl"
    data = [line.encode("utf-8", "surrogatepass").replace(b"\r", b" ") for line in lines]
    path.write_bytes(b"\n".join(data))
    return path, sum(bool(line.strip()) for line in data)


@pytest.fixture
def unpictured(monkeypatch):
    """Without the histogram, which takes most of a small run's time."""
    monkeypatch.setattr(curate_report, "_lengths", lambda path, *_: path.write_bytes(b""))


@FAST
@given(st.lists(LINE, min_size=1, max_size=4))
def test_curate(unpictured, lines):
    with tempfile.TemporaryDirectory() as folder:
        path, count = written(folder, lines)
        out = Path(folder) / "out"
        try:
            curate.main(["--input", str(path), "--out", str(out), "--workers", "1"])
        except InputError as error:
            one_line(error)
            assert not (out / "train.jsonl").exists()
        else:
            counts = json.loads((out / "counts.json").read_text())
            kept = sum(1 for _ in read_jsonl(out / "train.jsonl"))
            assert counts["read"] == count == kept + sum(counts["dropped"].values())
        finally:
            files.release(out)


class Echo:
    """Servers that answer everything at once."""

    def __init__(self, urls, model, timeout, api_key):
        self.tokenizer, self.eos_ids, self.context = TOKENIZER[0], {2}, 512

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def ask(self, prompt_ids, messages, sampling):
        return distill_servers.Answer([5, 6, 2])


TOKENIZER: list = []


@pytest.fixture
def echo(monkeypatch, tokenizer, base_folder):
    TOKENIZER[:] = [tokenizer]
    monkeypatch.setattr(distill_servers, "Servers", Echo)
    monkeypatch.setattr(converse, "PATIENCE", 50)
    return str(base_folder)


@FAST
@given(st.lists(LINE, min_size=1, max_size=4))
def test_distill(echo, lines):
    with tempfile.TemporaryDirectory() as folder:
        path, count = written(folder, lines)
        out = Path(folder) / "out.jsonl"
        words = ["--model", echo, "--prompts", str(path), "--max-new-tokens", "8", "--in-flight", "2"]
        try:
            distill.main([*words, "--server", "http://127.0.0.1:9", "--out", str(out)])
        except InputError as error:
            one_line(error)
        except SystemExit as end:
            failed = sum(1 for _ in read_jsonl(Path(folder) / "out.failed.jsonl"))
            assert isinstance(end.code, str) and failed + sum(1 for _ in read_jsonl(out)) == count
        else:
            assert sum(1 for _ in read_jsonl(out)) == count
        finally:
            files.release(out)
