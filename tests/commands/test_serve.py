"""The command line for SGLang, and a server's life: readiness, death, hanging start, Ctrl-C (stand-ins on
loopback).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from helpers.stand_in import free_port

from fastmtp import serve
from fastmtp.cli import InputError
from fastmtp.engines import process, sglang

HERE = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path):
    return exported(tmp_path / "model")


def exported(folder, **changes):
    folder.mkdir()
    config = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def value(line, flag):
    return line[line.index(flag) + 1]


def test_the_command_line(model, tmp_path):
    path = tmp_path / "en_32k.pt"
    path.write_bytes(b"")
    line = sglang.command(model, 3, str(path), backend="triton")
    assert line[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert value(line, "--model-path") == model and value(line, "--port") == "30000"
    assert value(line, "--speculative-algorithm") == "EAGLE"
    assert (
        value(line, "--speculative-num-steps") == "3" and value(line, "--speculative-num-draft-tokens") == "4"
    )
    assert value(line, "--speculative-eagle-topk") == "1"
    assert value(line, "--speculative-token-map") == str(path.resolve())
    assert "--trust-remote-code" not in line
    plain = sglang.command(model, 0, backend="triton")
    assert not [part for part in plain if "speculative" in part]


def test_flags_of_the_user_win_and_stand_there_once(model):
    flags = ["--attention-backend", "flashinfer", "--tp-size=2", "--disable-radix-cache"]
    line = sglang.command(model, 3, flags=flags, backend="triton")
    assert "triton" not in line and line.count("--attention-backend") == 1
    assert "--tp-size" not in line and "--tp-size=2" in line and line[-1] == "--disable-radix-cache"


def test_old_flag_names_are_given_their_new_ones():
    assert sglang.renamed(["--cuda-graph-max-bs", "1", "--cuda-graph-max-bs=2", "--x"]) == [
        "--cuda-graph-max-bs-decode",
        "1",
        "--cuda-graph-max-bs-decode=2",
        "--x",
    ]


def test_remote_code_only_where_the_type_is_not_a_stock_one(tmp_path):
    released = exported(tmp_path / "mimo", model_type="mimo", auto_map={"AutoConfig": "c.C"})
    assert "--trust-remote-code" in sglang.command(released, backend="triton")
    ours = exported(tmp_path / "ours", auto_map={"AutoConfig": "c.C"})
    assert "--trust-remote-code" not in sglang.command(ours, backend="triton")


@pytest.mark.parametrize(
    "changes, given, message",
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, "export with fastmtp.export, or --no-spec"),
        ({"num_nextn_predict_layers": None}, {}, "num_nextn_predict_layers is None, must be 1"),
        ({}, {"token_map": "/nowhere/en.pt"}, "no such token map"),
        ({}, {"token_map": "/nowhere/en.pt", "num_steps": 0}, "no draft to shorten"),
        ({}, {"token_map": "/nowhere/en.pt", "tp": 2}, r"sgl-project/sglang/issues/4328"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changes, given, message, tmp_path):
    folder = exported(tmp_path / "m", **changes)
    with pytest.raises(InputError, match=message) as caught:
        sglang.command(folder, backend="triton", **given)
    assert "\n" not in str(caught.value)


def test_any_model_can_be_served_plain(tmp_path):
    folder = exported(tmp_path / "m", architectures=["LlamaForCausalLM"])
    assert sglang.command(folder, 0, backend="triton")
    with pytest.raises(InputError, match="no such model folder"):
        sglang.command(str(tmp_path / "none"))


def test_versions(monkeypatch):
    for version, fine in (("0.5.17", True), ("0.5.23", True), ("0.6.0rc1", True), ("0.5.9", False)):
        monkeypatch.setattr(sglang.importlib.metadata, "version", lambda name, v=version: v)
        if fine:
            assert sglang.sglang_version() == version
        else:
            with pytest.raises(InputError, match="too old"):
                sglang.sglang_version()


@pytest.mark.parametrize(
    "kernels, capability, backend",
    [(True, "9.0", "fa3"), (False, "9.0", "triton"), (True, "8.6", "triton"), (True, "", "triton")],
)
def test_the_attention_backend_is_what_can_run(kernels, capability, backend, tmp_path, monkeypatch):
    if kernels:
        (tmp_path / "flash_ops.abi3.so").write_bytes(b"")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(sglang.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sglang, "compute_capability", lambda: capability)
    assert sglang.attention_backend() == backend


def test_a_server_is_awaited_and_ended_with_its_children(tmp_path):
    port = free_port()
    # A child that holds on to something, as SGLang's scheduler does the GPU's memory, and ignores polite
    # requests.
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child', flush=True); time.sleep(60)"
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE);"
        f"p.stdout.readline(); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(0.3);"
        f"sys.argv = ['x', '--port', '{port}']; sys.path.insert(0, {str(HERE / 'helpers')!r}); import stand_in; stand_in.main()"
    )
    with process.Server([sys.executable, "-c", code], port, tmp_path / "log", stop_patience=1.0) as server:
        assert process.answers(server.url + "/health")
        pid = int((tmp_path / "pid").read_text())
        assert alive(pid)
    assert not process.answers(server.url + "/health")
    assert wait_gone(pid), "the child of a stopped server is gone too"


def alive(pid: int) -> bool:
    """Running and not merely unreaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while time.monotonic() < end and alive(pid):
        time.sleep(0.05)
    return not alive(pid)


def test_a_dying_server_shows_its_last_lines(tmp_path):
    code = "print('\\n'.join(f'line {n}' for n in range(100))); raise SystemExit(7)"
    with pytest.raises(process.ServerError) as caught:
        with process.Server([sys.executable, "-c", code], free_port(), tmp_path / "log"):
            pass
    text = str(caught.value)
    assert "exit code 7" in text and "line 99" in text and "line 75" in text and "line 74" not in text


def test_a_server_that_never_answers_is_ended(tmp_path):
    with pytest.raises(process.ServerError, match=r"does not answer after 0.6 s[\s\S]*loading"):
        code = "import time; print('loading', flush=True); time.sleep(60)"
        with process.Server([sys.executable, "-c", code], free_port(), tmp_path / "log", wait=0.6):
            pass


def test_a_taken_port_is_said_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is taken"):
            with process.Server(["false"], port, tmp_path / "log"):
                pass
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_server(sign, tmp_path):
    port = free_port()
    code = (
        "import sys; from pathlib import Path; from fastmtp import serve;"
        f"serve.serve([sys.executable, {str(HERE / 'helpers' / 'stand_in.py')!r}, '--port', '{port}'], {port}, Path({str(tmp_path / 'log')!r}))"
    )
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    while "Ctrl-C stops it" not in (line := process.stdout.readline()):
        assert line, "ended before it was ready"
    process.send_signal(sign)
    rest = process.communicate(timeout=20)[0]
    assert process.returncode == 0 and rest.strip() == "stopped"
    assert not process.answers(f"http://127.0.0.1:{port}/health")


def test_main_prints_the_command_and_names_what_is_wrong(model, capsys, monkeypatch):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    serve.main(["--model", model, "--dry-run", "--", "--cuda-graph-max-bs", "1"])
    assert capsys.readouterr().out.strip().endswith("--cuda-graph-max-bs-decode 1")
    with pytest.raises(InputError, match="--num-steps 0"):
        serve.main(["--model", model, "--num-steps", "0"])
    with pytest.raises(InputError, match="--tp 0"):
        serve.main(["--model", model, "--tp", "0"])
    with pytest.raises(SystemExit) as caught:
        serve.main(["--model", model, "--mem-fraction-static", "0.7"])
    assert caught.value.code == 2


@pytest.mark.parametrize("own", [[], ["--", "--mem-fraction-static", "0.5"]])
def test_the_script_adds_the_single_stream_flags_unless_given_others(own, model):
    env = {**os.environ, "PYTHON": sys.executable}
    found = subprocess.run(
        ["sh", str(HERE.parent / "scripts" / "serve.sh"), "--model", model, "--dry-run", *own],
        capture_output=True,
        text=True,
        env=env,
    )
    assert found.returncode == 0, found.stderr
    assert ("--max-running-requests 1 --cuda-graph-max-bs-decode 1" in found.stdout) == (not own)
    assert "--speculative-num-steps 3" in found.stdout


def test_with_fa3_the_draft_keeps_its_cuda_graphs(model):
    flag = "--speculative-draft-attention-backend"
    line = sglang.command(model, 3, backend="fa3")
    assert line[line.index(flag) + 1] == "triton"
    assert flag not in sglang.command(model, 0, backend="fa3") and flag not in sglang.command(
        model, 3, backend="triton"
    )
    own = sglang.command(model, 3, flags=[flag, "fa3"], backend="fa3")
    assert own.count(flag) == 1 and own[own.index(flag) + 1] == "fa3"
