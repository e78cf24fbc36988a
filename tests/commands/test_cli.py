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
    """Run `command` as the console would; check the code, the one line, and that no file appeared or changed."""
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
        ("decoding", f"{GENERATING} --model headless", ["headless", "model.mtp_layers.0", "prepare_model"]),
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
        ("distill", f"{GENERATING} --out headless", ["headless", "Is a directory", "another path"]),
        ("distill", f"{GENERATING} --out prompts.jsonl/out.jsonl", ["prompts.jsonl", "another path"]),
        ("acceptance", f"{MEASURING} --data none.jsonl", ["none.jsonl"]),
        ("acceptance", f"{MEASURING} --data broken.jsonl", ["broken.jsonl:2"]),
        ("acceptance", f"{MEASURING} --data prompts.jsonl", ["prompts.jsonl:1", "prompt_ids"]),
        ("acceptance", f"{MEASURING} --num-steps 0", ["--num-steps", "0"]),
        ("acceptance", f"{MEASURING} --at x", ["--at x", "1,3,5"]),
        ("acceptance", f"{MEASURING} --token-map outside.pt", ["outside.pt", "99999"]),
        ("acceptance", f"{MEASURING} --head headless", ["headless", "final_layernorm"]),
        ("acceptance", f"{MEASURING} --head none", ["none"]),
        ("export", "--base model --head headless --out new", ["headless", "lacks model.mtp_layers.0"]),
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

    with pytest.raises(InputError, match="prompt 'a' has 18 tokens.*shorten"):
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


def test_run_s_exit_codes(capsys):
    for function, code in (
        (lambda: None, 0),
        (lambda: stop(InputError("x: wrong")), 2),
        (lambda: stop(KeyboardInterrupt()), 1),
    ):
        with pytest.raises(SystemExit) as end:
            run(function)
        assert end.value.code == code
    err = capsys.readouterr().err
    assert "error: x: wrong\n" in err and "interrupted" in err and err.count("\n") == 2
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback, and Python's exit code 1
        run(lambda: 1 / 0)


def stop(error: BaseException):
    raise error


def test_the_console_command_lists_and_refuses(capsys):
    cli.main([])
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    with pytest.raises(InputError, match="frobnicate"):
        cli.main(["frobnicate"])


@pytest.mark.parametrize(
    "command", ["decoding", "distill", "acceptance", "export", "prepare_model", "train", "curate"]
)
def test_help_has_a_real_example(command, capsys):
    module = importlib.import_module(f"fastmtp.{command}")
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "example:\n" in out
    example = out.split("example:\n")[1].replace("\\\n", " ").splitlines()[0].split()
    words = example[example.index(f"fastmtp.{command}") + 1 :]
    module.parser().parse_known_args(words)


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


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_show_their_help(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0 and "example:" in capsys.readouterr().out
