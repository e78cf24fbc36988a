"""Inputs: broken lines are named by file and number, shipped files are found from any folder."""

import gzip
from pathlib import Path

import pytest

from fastmtp.cli import InputError
from fastmtp.inputs import existing, read_jsonl, resource

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("packed", [False, True])
def test_read_jsonl_numbers_lines_and_passes_blank_ones_over(tmp_path, packed):
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    text = '{"a": 1}\n\n{"a": "é"}\n'.encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "é"})]


@pytest.mark.parametrize(
    "content, place",
    [
        (b'{"a": 1}\n{"a": \n', ":2"),
        (b'{"a": 1}\n[1]\n', ":2"),
        (b'{"a": "\xff"}\n', ""),
        (b"\x00\x01\xfe", ""),
    ],
)
def test_broken_lines_are_named(tmp_path, content, place):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_jsonl(path))
    assert f"x.jsonl{place}" in str(error.value) and "\n" not in str(error.value)


def test_missing_folder_and_false_gzip_are_named(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(b"not packed")
    for path in (tmp_path / "none.jsonl", tmp_path, tmp_path / "x.jsonl.gz"):
        with pytest.raises(InputError, match=path.name):
            list(read_jsonl(path))
    with pytest.raises(InputError, match="no such folder"):
        existing(tmp_path / "none", "folder")


def test_a_shipped_file_is_found_from_any_folder_and_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resource("configs/quickstart.yaml").is_file() and resource("fastmtp/files.py").is_file()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("mine")
    assert resource("configs/quickstart.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    "path", ["configs/none.yaml", "README.md", "/configs/quickstart.yaml", "", "tests/conftest.py"]
)
def test_other_paths_are_left_as_they_are(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert str(resource(path)) == str(Path(path))
