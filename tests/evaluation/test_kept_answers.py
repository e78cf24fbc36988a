"""Kept answers: used again for the same content, refused by name for other content."""

import os
import shutil
import types

import pytest
import torch
from helpers.evaluating import arguments, fake_decoder
from helpers.stand_in import free_port

from evaluation import agreement, lossless, plan, run
from fastmtp import checkpoint
from fastmtp.cli import InputError


@pytest.fixture
def reference(model, short_tasks, monkeypatch, tmp_path):
    """run(*more) of one small evaluation with the decoder faked; its model may be changed. Gives the number
    of questions asked.
    """
    calls = fake_decoder(monkeypatch)
    folder, head = tmp_path / "model", tmp_path / "model" / checkpoint.HEAD_FILE
    shutil.copytree(model, folder)
    head.write_bytes(b"first")
    map_path = tmp_path / "small.pt"
    torch.save(torch.arange(20), map_path)

    def ask(*more, folder=folder, short_tasks=short_tasks, command=run.main):
        calls.clear()
        options = ["--backend", "reference", "--tasks", "nq_qa", "--arms", "baseline,fastmtp:2+small"]
        maps = ["--token-map", f"small={map_path}"]
        command(arguments(str(folder), short_tasks, tmp_path / "out", *options, *maps, *more))
        return len(calls)

    return types.SimpleNamespace(ask=ask, folder=folder, head=head, map=map_path, out=tmp_path / "out")


def exchange_head(r, monkeypatch):
    r.head.write_bytes(b"other")


def exchange_map(r, monkeypatch):
    torch.save(torch.arange(30), r.map)


def exchange_template(r, monkeypatch):
    (r.folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")


@pytest.mark.parametrize(
    "change, more, difference",
    [
        (exchange_head, [], "head: other content"),
        (exchange_map, [], "token map: other content"),
        (exchange_template, [], "model: other content"),
        (None, ["--max-gen-length", "9"], "max_gen_length: 30 -> 9"),
        (None, ["--dtype", "bfloat16"], 'dtype: "float32" -> "bfloat16"'),
        (None, ["--seed", "3"], "seed: 0 -> 3"),
    ],
)
def test_answers_that_depend_on_something_else_are_refused_by_name(
    change, more, difference, reference, monkeypatch
):
    assert reference.ask() > 0
    results = (reference.out / "results.jsonl").read_bytes()
    if change:
        change(reference, monkeypatch)
    for command in (run.main, lossless.main, agreement.main):
        with pytest.raises(InputError, match=difference) as caught:
            reference.ask(*more, command=command)
        assert "give another --out" in str(caught.value) and "\n" not in str(caught.value)
    assert (reference.out / "results.jsonl").read_bytes() == results


def test_the_same_content_is_kept_whatever_its_names_and_times(reference, capsys, tmp_path):
    reference.ask()
    assert "evaluation: 18 asked, 0 kept" in capsys.readouterr().err
    for path in reference.folder.iterdir():
        os.utime(path, (1, 1))
    assert reference.ask() == 0 and "evaluation: 0 asked, 18 kept" in capsys.readouterr().err
    moved = shutil.copytree(reference.folder, tmp_path / "elsewhere")
    assert reference.ask(folder=moved) == 0


def test_the_engines_flags_environment_and_gpu_are_part_of_an_answer(
    model, short_tasks, started, monkeypatch, tmp_path
):
    out, port = tmp_path / "out", str(free_port())
    given = arguments(model, short_tasks, out, "--tasks", "nq_qa", "--arms", "baseline", "--port", port)
    run.main([*given, "--repeat-questions", "0", "--", "--mem-fraction-static=0.5"])
    # The same, written otherwise, on another port: nothing is asked.
    run.main(
        [*given, "--port", str(free_port()), "--repeat-questions", "0", "--", "--mem-fraction-static", "0.5"]
    )
    assert len(started) == 1
    same = ["--", "--mem-fraction-static", "0.5"]
    for more, difference in (
        (["--", "--mem-fraction-static", "0.6"], "--mem-fraction-static: "),
        (["--parallel", "2", *same], "parallel: 1 -> 2"),
        (["--at-once", "2", *same], "--max-total-tokens: none -> "),
        (["--backend", "reference"], "backend: "),
    ):
        with pytest.raises(InputError, match=difference):
            run.main([*given, *more])
    monkeypatch.setattr(plan, "gpu_name", lambda: "NVIDIA H100")
    with pytest.raises(InputError, match='gpu: none -> "NVIDIA H100"'):
        run.main([*given, *same])
    monkeypatch.undo()


def test_a_folder_with_files_of_ones_own_keeps_them(reference):
    reference.out.mkdir()
    (reference.out / "table.md").write_text("my own table")
    with pytest.raises(InputError, match="table.md: the file was not written by this project"):
        reference.ask()
    assert (reference.out / "table.md").read_text() == "my own table"


def test_maps_and_numbers_are_checked_before_anything_is_asked(reference, tmp_path):
    torch.save(torch.tensor([3, 9000]), reference.map)
    with pytest.raises(InputError, match="id 9000 is outside"):
        reference.ask()
    torch.save(torch.arange(20), reference.map)
    reference.map.with_suffix(".json").write_text("[1, 2]")
    with pytest.raises(InputError, match="small.json"):
        reference.ask()
    reference.map.with_suffix(".json").unlink()
    for more, message in (
        (["--temperature", "nan"], "--temperature nan"),
        (["--port", "65536"], "--port 65536"),
        (["--port", "65535", "--at-once", "2"], "--port 65535: must be between 1 and 65534"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--repeat-questions", "-1"], "--repeat-questions must be at least 0"),
        (["--", "--tp", "2"], "takes no flags"),
    ):
        with pytest.raises(InputError, match=message):
            reference.ask(*more)
    for command in (lossless.main, agreement.main):
        with pytest.raises(InputError, match="--tolerance nan"):
            reference.ask("--tolerance", "nan", command=command)
    assert not reference.out.exists()
