"""What lies on disk after a command was stopped: a whole file, or none, or one that the same command
continues.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtp import files, inputs, leftovers
from fastmtp.cli import InputError
from fastmtp.files import (
    atomic,
    claim,
    growing,
    release,
    write_json,
    write_jsonl,
    write_provenance,
)
from fastmtp.inputs import read_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]


def test_atomic_leaves_nothing_on_failure_and_the_old_file_as_it_was(tmp_path):
    path = tmp_path / "out" / "x.txt"
    for before in (None, "old"):
        if before:
            path.write_text(before)
            write_provenance(path, {})
        with pytest.raises(RuntimeError):
            with atomic(path) as temporary:
                temporary.write_text("half")
                raise RuntimeError
        assert sorted(p.name for p in path.parent.iterdir()) == (
            ["x.txt", "x.txt.run.json"] if before else []
        )
    assert path.read_text() == "old"
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and len(list(path.parent.iterdir())) == 2


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
            write_provenance(folder, {})
    assert (
        sorted(p.name for p in path.iterdir()) == ["run.json", "two"] and len(list(tmp_path.iterdir())) == 1
    )


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl", "x.jsonl.run.json"]


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
    write_provenance(path, config, facts=config)
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


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "x.jsonl", [{"a": 1}, {"a": object()}])
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    assert not list(tmp_path.iterdir())


# --- what is not ours


@pytest.mark.parametrize("name", ["mine.txt", "mine.jsonl"])
def test_somebody_elses_file_is_neither_claimed_nor_replaced(tmp_path, name):
    path = tmp_path / name
    path.write_text("precious")
    for attempt in (lambda: claim(path), lambda: write_json(path, {}), lambda: write_jsonl(path, [])):
        with pytest.raises(InputError, match=name):
            attempt()
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]


def test_a_shared_folder_keeps_what_was_there_before(tmp_path):
    (tmp_path / "table.json").write_text("precious")
    claim(tmp_path, folder=True)
    write_json(tmp_path / "answers.json", {"n": 1})
    write_json(tmp_path / "answers.json", {"n": 2})
    for _ in range(2):
        with pytest.raises(InputError, match="table.json"):
            write_json(tmp_path / "table.json", {})
        write_provenance(tmp_path, {})  # a finished record remembers it too
    assert (tmp_path / "table.json").read_text() == "precious"


def test_a_file_added_to_a_folder_of_ours_is_not_swept_away(tmp_path):
    with atomic(tmp_path / "model") as folder:
        folder.mkdir()
        (folder / "weights").write_text("ours")
        write_provenance(folder, {})
    (tmp_path / "model" / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="notes.txt"):
        with atomic(tmp_path / "model") as folder:
            folder.mkdir()
    assert (tmp_path / "model" / "notes.txt").read_text() == "precious"


def test_what_somebody_puts_into_a_finished_folder_of_ours_stays_theirs(tmp_path):
    out = tmp_path / "out"
    files.claim(out, folder=True)
    files.write_json(out / "table.json", {"a": 1})
    files.write_provenance(out, {})
    (out / "notes.jsonl").write_text("mine\n")
    (out / "sub").mkdir()
    (out / "sub" / "mine.jsonl").write_text("mine\n")
    for path in (out / "notes.jsonl", out / "sub" / "mine.jsonl"):
        with pytest.raises(InputError, match="not written by this command"):
            files.claim(path)
        assert path.read_text() == "mine\n"


def test_an_output_that_is_an_input_under_another_name_is_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    files.check_apart(tmp_path / "a", None, tmp_path / "c", tmp_path)
    for other in ("a", "b"):
        with pytest.raises(InputError, match="an input of this command too"):
            files.check_apart(tmp_path / "a", tmp_path / other)


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' + '{"a": "' + "x" * 100 + '"}\n')
    with pytest.raises(InputError, match="a.jsonl:2: longer than 0 MB; split or remove this line"):
        list(inputs.read_jsonl(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "not JSON",
        '{"name": "theirs"}',
        '{"command": "python train.py"}',
        '{"command": "make", "others": 3}',
    ],
)
def test_a_run_json_of_another_kind_is_not_ours(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "x").write_text("precious")
    with pytest.raises(InputError, match="run.json"):
        claim(tmp_path, folder=True)
    with pytest.raises(InputError, match="run.json"):
        write_provenance(tmp_path, {})
    with pytest.raises(InputError):
        write_json(tmp_path / "x", {})
    assert (tmp_path / "run.json").read_text() == text and (tmp_path / "x").read_text() == "precious"


def test_two_processes_do_not_write_one_output(tmp_path):
    path = tmp_path / "x.jsonl"
    program = (
        "import sys; from fastmtp.cli import run; from fastmtp.files import claim\n"
        "def main(): claim(sys.argv[1]); print('mine', flush=True); sys.stdin.read()\n"
        "run(main)"
    )
    command = [sys.executable, "-c", program, str(path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "mine\n"
    second = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert second.returncode == 2 and "another process" in second.stderr and second.stderr.count("\n") == 1
    first.kill()
    first.wait()
    assert subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("ending, left", [("InputError", False), ("KeyboardInterrupt", True)])
def test_what_is_refused_leaves_no_record(tmp_path, ending, left):
    (tmp_path / "theirs").mkdir()
    program = (
        "from pathlib import Path\n"
        "from fastmtp.cli import InputError, run\n"
        "from fastmtp.files import claim, write_json\n"
        "def main():\n"
        "    for name in ('new.json', 'begun.jsonl', 'done.json'): claim(name)\n"
        "    for name in ('ours', 'theirs', 'filled'): claim(name, folder=True)\n"
        "    Path('.begun.jsonl.partial').write_text('{}')\n"
        "    Path('filled/answers').write_text('{}')\n"
        "    write_json('done.json', {})\n"
        f"    raise {ending}('no')\n"
        "run(main)"
    )
    made = subprocess.run([sys.executable, "-c", program], cwd=tmp_path)
    assert made.returncode == (1 if left else 2)
    records = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*run.json")}
    kept = {"begun.jsonl.run.json", "done.json.run.json", "filled/run.json"}
    refused = {"new.json.run.json", "ours/run.json", "theirs/run.json"}
    assert records == (kept | refused if left else kept)
    assert (tmp_path / "theirs").is_dir() and (tmp_path / "ours").exists() == left


def test_a_kill_before_the_record_is_written_leaves_no_false_record(tmp_path):
    path = tmp_path / "x.jsonl"
    for seed in (0, 1):
        with growing(path, {"seed": seed}) as (_, write):
            write({"id": "a", "seed": seed})
        if not seed:
            write_provenance(path, {}, facts={"seed": 0})
    with growing(path, {"seed": 0}) as (done, write):
        assert done == {}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    for error in (
        OSError(errno.ENOSPC, "No space"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(InputError, match="disk is full"):
            with atomic(tmp_path / "x") as temporary:
                temporary.write_text("half")
                raise error
    assert not list(tmp_path.iterdir())


# --- what comes with the project


def left_behind(path: Path, kind: str) -> Path:
    """What a killed process leaves: a folder with one file, under the hidden name that it used."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        folder = path.with_name(f".{path.name}.{process.pid}.{kind}")
    folder.mkdir(parents=True)
    (folder / kind).write_text("x")
    return folder


def test_what_a_killed_process_left_is_removed_and_what_it_moved_aside_comes_back(tmp_path):
    out = tmp_path / "out"
    torn, old = left_behind(out, "tmp"), left_behind(out, "old")
    mine = [out.with_name(name) for name in (".out.tmp", ".out.x1.tmp", ".out2.99999.tmp", ".out.old")]
    mine.append(out.with_name(f".out.{os.getppid()}.tmp"))  # of a process that runs
    for path in mine:
        path.write_text("not to be touched")
    leftovers.clear(out)
    assert not torn.exists() and not old.exists() and (out / "old").exists()
    old = left_behind(out, "old")
    leftovers.clear(out)  # the new folder is there: the old one was about to be removed
    assert not old.exists() and (out / "old").exists()
    assert all(path.exists() for path in mine)


def test_a_process_number_that_comes_again_finds_no_rests(tmp_path):
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    with atomic(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "new").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


@pytest.mark.parametrize("last", ["os.replace", "fastmtp.files._rewrite", "pathlib.Path.unlink"])
def test_growing_killed_at_its_end_keeps_every_row(tmp_path, last):
    path = tmp_path / "rows.jsonl"
    with growing(path, {"a": 0}) as (_, write):
        write({"id": "0"})
    code = f"""
import os, signal, pathlib, sys, fastmtp.files
with fastmtp.files.growing(sys.argv[1], {{"a": 1}}) as (done, write):
    write({{"id": "1"}})
    {last} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
"""
    release(path)
    killed = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    with growing(path, {"a": 1}) as (done, _):
        assert done == {"1": {"id": "1"}}
    assert path.read_text() == '{"id": "1"}\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "rows.jsonl.run.json"]
