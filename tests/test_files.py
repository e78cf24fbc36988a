"""What lies on disk after a command was stopped: a whole file, or none, or one that the same command continues."""

import gzip
import json
import os
import signal
import subprocess
import sys

import pytest

from fastmtp.cli import InputError
from fastmtp.files import (
    atomic,
    existing,
    growing,
    provenance,
    read_jsonl,
    sha256,
    write_json,
    write_jsonl,
    write_provenance,
)


def test_atomic_leaves_nothing_on_failure_and_the_old_file_as_it_was(tmp_path):
    path = tmp_path / "out" / "x.txt"
    for before in (None, "old"):
        if before:
            path.write_text(before)
        with pytest.raises(RuntimeError):
            with atomic(path) as temporary:
                temporary.write_text("half")
                raise RuntimeError
        assert [p.name for p in path.parent.iterdir()] == (["x.txt"] if before else [])
    assert path.read_text() == "old"
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and len(list(path.parent.iterdir())) == 1


def test_atomic_folder(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(RuntimeError):
        with atomic(path) as folder:
            folder.mkdir()
            (folder / "a").write_text("half")
            raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):  # a folder of our own making is replaced as a whole
        with atomic(path) as folder:
            folder.mkdir()
            (folder / text).write_text(text)
            (folder / "run.json").write_text("{}")
    assert sorted(p.name for p in path.iterdir()) == ["run.json", "two"] and len(list(tmp_path.iterdir())) == 1


def test_atomic_spares_a_folder_that_is_not_ours(tmp_path):
    """`--out models` must not sweep away everything in models."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").write_text("precious")
    with pytest.raises(InputError, match="models"):
        with atomic(tmp_path / "models") as folder:
            folder.mkdir()
    assert (tmp_path / "models" / "mine").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_growing_continues_after_an_error_and_is_absent_until_whole(tmp_path):
    path, config = tmp_path / "x.jsonl", {"seed": 0}
    with pytest.raises(RuntimeError):
        with growing(path, config) as (done, write):
            assert done == {}
            write({"id": "a", "text": "ä"})
            raise RuntimeError
    assert not path.exists()
    with growing(path, config) as (done, write):
        assert done == {"a": {"id": "a", "text": "ä"}}
        write({"id": "b"})
    assert [row["id"] for _, row in read_jsonl(path)] == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_growing_other_settings_start_afresh(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(RuntimeError):
        with growing(path, {"seed": 0}) as (_, write):
            write({"id": "a"})
            raise RuntimeError
    with growing(path, {"seed": 1}) as (done, write):
        assert done == {}
        write({"id": "c"})
    assert [row["id"] for _, row in read_jsonl(path)] == ["c"]


def test_growing_a_finished_file_counts_as_done_under_the_same_settings_only(tmp_path):
    path, config = tmp_path / "x.jsonl", {"seed": 0}
    with growing(path, config) as (_, write):
        write({"id": "a"})
    write_provenance(path, config)
    with growing(path, config) as (done, _):
        assert set(done) == {"a"}
    with growing(path, {"seed": 2}) as (done, write):
        assert not done
        write({"id": "z"})
    assert [row["id"] for _, row in read_jsonl(path)] == ["z"]


def test_growing_survives_a_kill_in_the_middle_of_a_line(tmp_path):
    """A process writes two rows and half of a third and kills itself; the third is lost, the file goes on."""
    program = (
        "import os, signal, sys\n"
        "from fastmtp.files import growing\n"
        "with growing(sys.argv[1], {'a': 1}) as (done, write):\n"
        "    write({'id': '1'}); write({'id': '2'})\n"
        "    import glob\n"
        "    with open(glob.glob(os.path.join(os.path.dirname(sys.argv[1]), '.*.partial'))[0], 'a') as out:\n"
        '        out.write(\'{"id": "3\')\n'
        "        out.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "x.jsonl"
    killed = subprocess.run([sys.executable, "-c", program, str(path)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL and not path.exists()
    with growing(path, {"a": 1}) as (done, write):
        assert set(done) == {"1", "2"}
        write({"id": "3"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["1", "2", "3"]


@pytest.mark.parametrize("packed", [False, True])
def test_read_jsonl_numbers_lines_and_passes_blank_ones_over(tmp_path, packed):
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    text = '{"a": 1}\n\n{"a": "é"}\n'.encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "é"})]


@pytest.mark.parametrize(
    "content, place",
    [(b'{"a": 1}\n{"a": \n', ":2"), (b'{"a": 1}\n[1]\n', ":2"), (b'{"a": "\xff"}\n', ""), (b"\x00\x01\xfe", "")],
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


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "x.jsonl", [{"a": 1}, {"a": object()}])
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    assert not list(tmp_path.iterdir())


def test_provenance_says_what_made_it(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    (tmp_path / "folder").mkdir()
    for output, record in ((tmp_path / "out.jsonl", "out.run.json"), (tmp_path / "folder", "folder/run.json")):
        write_provenance(output, {"seed": 3}, [source, tmp_path / "none"])
        found = json.loads((tmp_path / record).read_text())
        assert found["config"] == {"seed": 3} and found["inputs"] == {str(source): sha256(source)}
        assert found["versions"]["torch"]


def test_provenance_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = provenance({"seed": 0})
    assert found["git_commit"] is None and found["config"] == {"seed": 0}
