"""What lies on disk after a command was stopped: a whole file, or none, or one that the same command
continues.
"""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtp import leftovers
from fastmtp.cli import InputError
from fastmtp.files import (
    atomic,
    claim,
    growing,
    provenance,
    release,
    sha256,
    write_json,
    write_jsonl,
    write_provenance,
)
from fastmtp.inputs import existing, read_jsonl, resource

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
    for output, record in (
        (tmp_path / "out.jsonl", "out.jsonl.run.json"),
        (tmp_path / "folder", "folder/run.json"),
    ):
        write_provenance(output, {"seed": 3}, [source, tmp_path / "none"])
        found = json.loads((tmp_path / record).read_text())
        assert found["config"] == {"seed": 3} and found["inputs"] == {str(source): sha256(source)}
        assert found["versions"]["torch"]


def test_provenance_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = provenance({"seed": 0})
    assert found["git_commit"] is None and found["config"] == {"seed": 0}


@pytest.fixture
def clone(tmp_path):
    """A small checkout: what tells its state, committed. Gives (folder, git_state in it)."""
    root = tmp_path / "clone"
    (root / "fastmtp").mkdir(parents=True)
    for name in ("pyproject.toml", *(f"fastmtp/{n}.py" for n in ("__init__", "checkout"))):
        shutil.copy(REPOSITORY / name, root / name)

    def state(**environment: str) -> dict:
        code = "import json; from fastmtp.checkout import git_state; print(json.dumps(git_state()))"
        variables = {**os.environ, "PYTHONPATH": str(root), **environment}
        command = [sys.executable, "-c", code]
        return json.loads(subprocess.check_output(command, env=variables, cwd=tmp_path))

    commit(root)
    return root, state


def commit(root: Path) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "m"]):
        subprocess.run(["git", *words], cwd=root, check=True)


def test_git_state_of_a_clone(clone, tmp_path):
    root, state = clone
    clean = state()
    assert len(clean["git_commit"]) == 40 and clean["git_dirty"] is False
    (root / "data").mkdir()
    (root / "data" / "mine.jsonl").write_text("{}")
    assert state() == clean  # one's own data is no change of the code
    (root / "fastmtp" / "new.py").write_text("x = 1\n")
    assert state() == clean | {"git_dirty": True}
    (root / "fastmtp" / "new.py").unlink()
    (root / "fastmtp" / "checkout.py").write_text((root / "fastmtp" / "checkout.py").read_text() + "# x\n")
    assert state() == clean | {"git_dirty": True}
    (tmp_path / "other").mkdir()
    commit_of_hook = {"GIT_DIR": str(tmp_path / "other" / ".git"), "GIT_WORK_TREE": str(tmp_path / "other")}
    assert state(**commit_of_hook) == clean | {"git_dirty": True}


def test_somebody_elses_repository_is_not_reported(clone, tmp_path):
    root, state = clone
    shutil.rmtree(root / ".git")
    commit(tmp_path)  # the folder around it: a vendored copy, or site-packages inside a project
    assert state() == {"git_commit": None, "git_dirty": None}
    (root / "pyproject.toml").write_text("[project]\nname = 'theirs'\n")
    commit(root)
    assert state() == {"git_commit": None, "git_dirty": None}


@pytest.mark.parametrize(
    "program, expected",
    [
        (str(REPOSITORY / "evaluation" / "run.py"), "python -m evaluation.run --x 'a b'"),
        (str(REPOSITORY / "benchmarks" / "speed" / "run.py"), "python -m benchmarks.speed.run --x 'a b'"),
        (str(REPOSITORY / "fastmtp" / "train.py"), "python -m fastmtp.train --x 'a b'"),
        ("/home/u/.venv/bin/fastmtp", "fastmtp --x 'a b'"),
        (str(REPOSITORY / ".venv" / "lib" / "tool.py"), "tool.py --x 'a b'"),
        ("-c", "python -c --x 'a b'"),
    ],
)
def test_the_recorded_command_holds_no_path_of_the_machine(monkeypatch, program, expected):
    monkeypatch.setattr(sys, "argv", [program, "--x", "a b"])
    assert provenance({})["command"] == expected


def test_a_bench_script_started_in_its_own_folder_is_recorded_by_its_module(monkeypatch):
    monkeypatch.chdir(REPOSITORY / "evaluation" / "mt_bench")
    monkeypatch.setattr(sys, "argv", ["bench_sglang_eagle.py"])
    assert provenance({})["command"] == "python -m evaluation.mt_bench.bench_sglang_eagle"


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
