"""Bad input, command by command: exit code 2, one line on stderr that names what and where, nothing
half-written.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fastmtp
from fastmtp import cli
from fastmtp.checkpoint import PREFIX
from fastmtp.cli import InputError, Parser, run

REPOSITORY = Path(__file__).resolve().parents[2]
CHAT = {"id": "a", "messages": [{"role": "user", "content": "what is two plus two?"}]}
SAMPLE = {**CHAT, "prompt_ids": [5, 6], "output_ids": [7, 8, 9]}


@pytest.fixture
def place(tmp_path, base_folder, monkeypatch):
    """A working folder with one good file of each kind; what a command may not change."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(base_folder, target_is_directory=True)
    (tmp_path / "prompts.jsonl").write_text(json.dumps(CHAT) + "\n")
    (tmp_path / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    (tmp_path / "broken.jsonl").write_text(json.dumps(CHAT | SAMPLE) + "\n" + '{"id": "b", "mess\n')
    (tmp_path / "headless").mkdir()
    for path in base_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "headless" / path.name).write_bytes(path.read_bytes())
    body = {n: t for n, t in load_file(base_folder / "model.safetensors").items() if not n.startswith(PREFIX)}
    save_file(body, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    torch.save(torch.tensor([1, 2, 99_999]), tmp_path / "outside.pt")
    recipe = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    recipe |= {"model": "model", "dataset": ["prompts.jsonl"], "output_dir": "run"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "notyaml.yaml").write_text("model: x\n\tb: 2\n")
    return tmp_path


def fails(command: str, words: str, capsys, expected: list[str]) -> None:
    """Run `command` as the console would: code 2, one line, and no file has appeared or changed."""
    module = importlib.import_module(f"fastmtp.{command}")
    before = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(lambda: module.main(words.split()))
    err = capsys.readouterr().err
    assert end.value.code == 2, err
    assert err.count("\n") == 1 and err.endswith("\n") and "error: " in err, err
    assert [part for part in expected if part not in err] == [], err
    assert {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")} == before


GENERATING = "--model model --prompts prompts.jsonl --dtype float32 --out out.jsonl"
MEASURING = "--model model --data samples.jsonl --out out.json"


@pytest.mark.parametrize(
    "command, words, expected",
    [
        ("decoding", f"{GENERATING} --prompts none.jsonl", ["none.jsonl"]),
        ("decoding", f"{GENERATING} --model none", ["none", "model folder"]),
        (
            "decoding",
            f"{GENERATING} --model headless",
            ["headless", "model.mtp_layers.0", "prepare_model"],
        ),
        ("decoding", f"{GENERATING} --prompts broken.jsonl", ["broken.jsonl:2"]),
        ("decoding", f"{GENERATING} --split held", ["prompts.jsonl", "held"]),
        ("decoding", f"{GENERATING} --num-steps 0", ["--num-steps", "0"]),
        ("decoding", f"{GENERATING} --num-steps -3", ["--num-steps", "-3"]),
        ("decoding", f"{GENERATING} --max-new-tokens 0", ["--max-new-tokens", "0"]),
        ("decoding", f"{GENERATING} --token-map outside.pt", ["outside.pt", "99999"]),
        ("decoding", f"{GENERATING} --token-map none.pt", ["none.pt"]),
        ("decoding", f"{GENERATING} --frobnicate 1", ["--frobnicate", "--help"]),
        ("decoding", "--model model", ["--prompts"]),
        ("decoding", f"{GENERATING} --device nosuch", ["--device nosuch", "cpu"]),
        ("decoding", f"{GENERATING} --device cuda:99", ["--device cuda:99", "cpu"]),
        ("distill", f"{GENERATING} --prompts none.jsonl", ["none.jsonl"]),
        ("distill", f"{GENERATING} --prompts broken.jsonl", ["broken.jsonl:2"]),
        ("distill", f"{GENERATING} --max-new-tokens 0", ["--max-new-tokens"]),
        ("distill", f"{GENERATING} --temperature -1", ["--temperature"]),
        ("distill", f"{GENERATING} --frobnicate", ["--frobnicate"]),
        ("distill", f"{GENERATING} --server 127.0.0.1:30000", ["--server 127.0.0.1:30000", "http://"]),
        ("distill", f"{GENERATING} --out headless", ["headless", "another path"]),
        ("distill", f"{GENERATING} --out prompts.jsonl/out.jsonl", ["prompts.jsonl", "another path"]),
        ("acceptance", f"{MEASURING} --data none.jsonl", ["none.jsonl"]),
        ("acceptance", f"{MEASURING} --data broken.jsonl", ["broken.jsonl:2"]),
        ("acceptance", f"{MEASURING} --data prompts.jsonl", ["prompts.jsonl:1", "prompt_ids"]),
        ("acceptance", f"{MEASURING} --num-steps 0", ["--num-steps", "0"]),
        ("acceptance", f"{MEASURING} --at x", ["--at x", "1,3,5"]),
        ("acceptance", f"{MEASURING} --token-map outside.pt", ["outside.pt", "99999"]),
        ("acceptance", f"{MEASURING} --head headless", ["headless", "final_layernorm"]),
        ("acceptance", f"{MEASURING} --head none", ["none"]),
        ("export", "--base model --head headless --out new", ["headless", "missing", "model.mtp_layers.0"]),
        ("export", "--base model --head none --out new", ["none"]),
        ("export", "--base none --head model --out new", ["none"]),
        ("export", "--base model --head model --out model", ["model", "new folder"]),
        ("export", "--base model --head model", ["--out"]),
        ("serve", "--model model --dry-run --token-map outside.pt", ["outside.pt", "99999"]),
        ("serve", "--model model --dry-run --token-map prompts.jsonl", ["prompts.jsonl", "not a token map"]),
        ("serve", "--model model --dry-run --port 99999", ["--port 99999", "65535"]),
        ("prepare_model", "--model ./none --out new", ["none", "check the path"]),
        ("prepare_model", "--model none.gguf --out new", ["none.gguf"]),
        ("prepare_model", "--model headless --out new", ["headless", "mtp_layers"]),
        ("train", "none.yaml", ["none.yaml"]),
        ("train", "notyaml.yaml", ["notyaml.yaml:2"]),
        ("train", "recipe.yaml --lerning_rate 1e-4", ["lerning_rate", "did you mean 'learning_rate'"]),
        ("train", "recipe.yaml --mtp_num_steps 0", ["mtp_num_steps", "0"]),
        ("train", "recipe.yaml --mtp_beta 0", ["mtp_beta"]),
        ("train", "recipe.yaml --mtp_attention causal", ["mtp_attention", "causal"]),
        ("train", "recipe.yaml --mtp_mean sequence", ["mtp_mean", "unknown"]),
        ("train", "recipe.yaml --model headless", ["headless"]),
        ("train", "recipe.yaml --model none", ["none"]),
        ("train", "recipe.yaml --dataset none.jsonl", ["none.jsonl"]),
        ("train", "recipe.yaml --learning_rate", ["--learning_rate has no value"]),
        ("train", "recipe.yaml --learning_rate 0", ["learning_rate must be above 0"]),
        ("train", "recipe.yaml --max_steps 0", ["max_steps", "at least 1"]),
        ("train", "recipe.yaml --num_train_epochs 0", ["num_train_epochs must be above 0"]),
        ("train", "recipe.yaml --trainable_parameters lm_head", ["trainable_parameters must be"]),
        ("train", "recipe.yaml --streaming true", ["streaming", "not supported"]),
        ("train", "recipe.yaml --save_strategy no", ["save_strategy", "keep nothing"]),
        ("train", "recipe.yaml --max-dropped 3", ["--max-dropped", "from 0 to 1"]),
        ("train", "recipe.yaml 5", ["'5'"]),
    ],
)
def test_bad_input(command, words, expected, place, capsys):
    if command == "train":
        pytest.importorskip("swift")
    fails(command, words, capsys, expected)


def test_unknown_recipe_keys_are_refused_in_the_file_too(place, capsys):
    pytest.importorskip("swift")
    with open("recipe.yaml", "a", encoding="utf-8") as recipe:
        recipe.write("freze_parameters: [model]\n")
    fails("train", "recipe.yaml", capsys, ["recipe.yaml", "freze_parameters", "freeze_parameters"])
    Path("recipe.yaml").write_text(
        Path("recipe.yaml")
        .read_text()
        .replace("freze_parameters: [model]\n", "")
        .replace("mtp_beta", "mtp_bta")
    )
    fails("train", "recipe.yaml", capsys, ["recipe.yaml", "mtp_bta", "mtp_beta"])


def test_the_recipe_may_be_left_out_before_overrides(place, capsys):
    """`sft.sh --learning_rate 1e-4` is the default recipe with one change, not a recipe named 1e-4."""
    fails("train", "--learning_rate 1e-4", capsys, ["configs/mimo7b_k3.yaml"])


def test_a_prompt_beyond_the_context_is_named(place):
    from fastmtp import distill

    with pytest.raises(InputError, match="prompt 'a':? has 18 tokens.*shorten"):
        distill.main(f"{GENERATING} --max-new-tokens 510".split())
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    "module, words", [("decoding", GENERATING + " --model headless"), ("train", "none.yaml")]
)
def test_as_a_process_the_one_line_is_all_there_is_on_stderr(module, words, place):
    """Warnings and reports of libraries would drown it; only a real process shows them."""
    result = subprocess.run(
        [sys.executable, "-m", f"fastmtp.{module}", *words.split()],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"fastmtp.{module}: error: "), (
        result.stderr
    )


def as_process(body: str, stdout=subprocess.PIPE) -> subprocess.CompletedProcess:
    """Run `body` (lines) as a command's main, in a process of its own."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    code = f"from fastmtp.cli import *\ndef main():\n{lines}\nrun(main, 'fastmtp x')"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "body, code, line",
    [
        ("pass", 0, ""),
        ("raise InputError('x: wrong')", 2, "fastmtp x: error: x: wrong\n"),
        ("raise InputError('x:\\nwrong')", 2, "fastmtp x: error: x: wrong\n"),  # a library's own line break
        ("open('/etc/passwd/x')", 2, "/etc/passwd/x: cannot be used (Not a directory); give another path\n"),
        ("open('/tmp/' + 300 * 'x', 'w')", 2, "cannot be used (File name too long); give another path\n"),
        (
            "import errno; raise OSError(errno.ENOSPC, 'full')",
            2,
            "the disk is full; free some space and try again\n",
        ),
        (
            "import torch; raise torch.cuda.OutOfMemoryError('60 GiB')",
            1,
            "out of memory (60 GiB); use smaller",
        ),
        ("print('\\ud83d')", 0, ""),  # half an emoji of a data file
    ],
)
def test_what_a_command_may_end_with_is_one_line(body, code, line):
    result = as_process(body)
    assert result.returncode == code and line in result.stderr, result.stderr
    assert result.stderr.count("\n") == (1 if line else 0)


def test_a_bug_keeps_its_traceback_and_ends_with_a_clear_line():
    result = as_process("1 / 0")
    assert result.returncode == 1 and result.stderr.startswith("Traceback")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("fastmtp x: error: unexpected ZeroDivisionError") and "report" in last


def test_output_that_is_not_written_is_no_success():
    with open("/dev/full", "w") as full:
        result = as_process("print('a table')", full)
    assert result.returncode == 2 and "disk is full" in result.stderr and result.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        result = as_process("for i in range(99999): print(i)", closed)
    assert result.returncode == 1 and result.stderr == ""
    result = as_process("raise BrokenPipeError('of a server')")
    assert "unexpected BrokenPipeError" in result.stderr


@pytest.mark.parametrize(
    "name, words",
    [
        ("fastmtp distill", "; the same command continues where this one stopped"),
        ("fastmtp.decoding", "; the same command continues where this one stopped"),
        ("evaluation.mt_bench.bench_sglang_eagle", "; the same command continues where this one stopped"),
        ("fastmtp export", "; the same command starts from the beginning"),
        ("fastmtp.prepare_model", "; the same command starts from the beginning"),
        ("benchmarks.speed.run", ""),
    ],
)
def test_an_interruption_says_what_the_same_command_does_next(name, words, capsys):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(stopped, name)
    assert end.value.code == 1 and capsys.readouterr().err == f"{name}: interrupted{words}\n"


def console(words: str, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fastmtp WORDS`."""
    with pytest.raises(SystemExit) as end:
        run(lambda: cli.main(words.split()), "fastmtp")
    return end.value.code, *capsys.readouterr()


def test_the_console_command_lists_and_refuses(capsys):
    code, out, _ = console("", capsys)
    assert code == 0 and all(name in out for name in cli.COMMANDS)
    assert console("--version", capsys) == (0, f"fastmtp {fastmtp.__version__}\n", "")
    code, out, err = console("frobnicate", capsys)
    assert code == 2 and out == "" and "frobnicate" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", [*(name for name in cli.COMMANDS if name != "bench"), "bench mt_bench"])
def test_every_command_of_the_console_shows_its_help(name, capsys):
    code, out, err = console(f"{name} --help", capsys)
    assert code == 0 and "example:\n" in out and err == ""


def test_bench_lists_its_tasks_and_refuses_others(capsys):
    code, out, _ = console("bench --help", capsys)
    assert code == 0 and "mt_bench" in out and "c_eval" in out
    code, _, err = console("bench", capsys)  # nothing was asked
    assert code == 2 and "mt_bench" in err and err.count("\n") == 1
    code, _, err = console("bench mtbench", capsys)
    assert code == 2 and "'mtbench'" in err and "mt_bench" in err and err.count("\n") == 1


def test_parser_errors_are_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        Parser("p", "d", "p --x").parse_args(["--no"])
    assert (
        end.value.code == 2
        and capsys.readouterr().err == "p: error: unrecognized arguments: --no (see --help)\n"
    )


def test_prompts_have_their_own_ids_and_a_limit_of_at_least_one(tmp_path):
    from fastmtp.data.prompts import read_prompts

    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="prompts.jsonl:2.*'a'"):
        read_prompts(path)
    with pytest.raises(InputError, match="--limit"):
        read_prompts(path, limit=0)


PROGRAMS = [
    path.relative_to(REPOSITORY)
    for folder in ("benchmarks", "evaluation")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
def test_programs_outside_the_package_show_their_help(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / path), run_name="__main__")
    assert end.value.code == 0 and "example:" in capsys.readouterr().out
