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
import torch
from helpers.stand_in import free_port

from fastmtp import serve
from fastmtp.cli import InputError
from fastmtp.engines import process, sglang, vllm
from fastmtp.engines.sglang_flags import canonical

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    """The engine tests of this machine may have installed one."""
    monkeypatch.setattr(vllm, "find_python", lambda: None)


@pytest.fixture
def model(tmp_path):
    return exported(tmp_path / "model")


def exported(folder, **changes):
    folder.mkdir()
    config = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}
    config["vocab_size"] = 400
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def a_map(folder, ids=range(20)):
    """A map without a description beside it."""
    torch.save(torch.tensor(list(ids)), folder / "en.pt")
    return str(folder / "en.pt")


def value(line, flag):
    return line[line.index(flag) + 1]


def test_the_command_line(model, tmp_path):
    path = a_map(tmp_path)
    line = sglang.command(model, 3, path, backend="triton")
    assert line[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert value(line, "--model-path") == model and value(line, "--port") == "30000"
    assert value(line, "--speculative-algorithm") == "EAGLE"
    assert (
        value(line, "--speculative-num-steps") == "3" and value(line, "--speculative-num-draft-tokens") == "4"
    )
    assert value(line, "--speculative-eagle-topk") == "1"
    assert value(line, "--speculative-token-map") == str(Path(path).resolve())
    assert "--trust-remote-code" not in line
    plain = sglang.command(model, 0, backend="triton")
    assert not [part for part in plain if "speculative" in part]


def test_flags_of_the_user_win_and_stand_there_once(model):
    flags = ["--attention-backend", "flashinfer", "--tp-size=2", "--disable-radix-cache"]
    line = sglang.command(model, 3, flags=flags, backend="triton")
    assert "triton" not in line and line.count("--attention-backend") == 1
    assert "--tp-size" not in line and "--tp-size=2" in line and line[-1] == "--disable-radix-cache"


def test_old_flag_names_are_given_their_new_ones():
    assert canonical(["--cuda-graph-max-bs", "1", "--cuda-graph-max-bs=2", "--x"]) == [
        "--cuda-graph-max-bs-decode",
        "1",
        "--cuda-graph-max-bs-decode=2",
        "--x",
    ]


def test_remote_code_only_if_the_user_says_so(tmp_path):
    released = exported(tmp_path / "mimo", model_type="mimo", auto_map={"AutoConfig": "c.C"})
    with pytest.raises(InputError, match="needs code from this folder; read that code"):
        sglang.command(released, backend="triton")
    allowed = sglang.command(released, flags=["--trust-remote-code"], backend="triton")
    assert allowed.count("--trust-remote-code") == 1
    known = exported(tmp_path / "known", auto_map={"AutoConfig": "c.C"})
    assert "--trust-remote-code" not in sglang.command(known, backend="triton")


TWO_GPUS = r"--token-map with --tp 2.*sgl-project/sglang/issues/4328"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tp 2", TWO_GPUS),
        ("--tp=2", TWO_GPUS),
        ("--tp-size 2", TWO_GPUS),
        ("--tensor-parallel-size=2", TWO_GPUS),
        ("--tensor-parallel-size 1 --tp 2", TWO_GPUS),
        ("--tensor-parallel 2", "abbreviated"),
        ("--tp two", "--tp two: must be a whole number"),
        ("--tp 0", "--tp 0: must be"),
        ("--port 30001", "--port 30001 after --"),
        ("--port=0", "--port 0 after --"),
        ("--host 0.0.0.0", "--host 0.0.0.0 after --"),
        ("--model other", "--model-path other after --"),
        ("--model-path=other", "--model-path other after --"),
        ("--speculative-num-steps 5", "--speculative-num-steps 5 after --"),
        ("--speculative-token-map ids.json", "ids.json after --.*give --token-map"),
        ("--speculative-num-draft-tokens 9", "must be 4 for 3 steps"),
        ("--speculative-eagle-topk 4", "must be 1 for drafts"),
        ("--speculative-algorithm NGRAM", "must be EAGLE"),
        ("--speculative-draft-model other", "the head in the model folder is the draft"),
        ("--speculative-accept-threshold-single 0.5", "must be 1 for drafts"),
        ("--speculative-num 5", "abbreviated"),
        ("--config server.yaml", "write its flags out"),
        ("--config=server.yaml", "write its flags out"),
        ("--api-key secret", "it would be printed"),
    ],
)
def test_flags_after_the_dashes_are_checked_like_our_own(flags, message, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    argv = ["--model", model, "--token-map", a_map(tmp_path), "--dry-run", "--", *flags.split()]
    with pytest.raises(InputError, match=message) as caught:
        serve.main(argv)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--speculative-algorithm EAGLE", "--speculative-num-steps=3"])
def test_plain_decoding_takes_no_drafting_flags(flag, model):
    with pytest.raises(InputError, match="--speculative-"):
        sglang.command(model, 0, flags=flag.split(), backend="triton")


def test_flags_that_repeat_our_options_stand_there_once(model):
    flags = ["--port", "30000", "--speculative-num-steps=3", "--speculative-draft-attention-backend", "fa3"]
    line = sglang.command(model, 3, port=30000, flags=flags, backend="triton")
    names = [part.partition("=")[0] for part in line if part.startswith("--")]
    assert len(names) == len(set(names)) and value(line, "--port") == "30000"
    assert sglang.command(model, 0, flags=flags[-2:], backend="triton"), "a baseline passes over it"


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_ports_and_hosts_that_cannot_be(port, model):
    with pytest.raises(InputError, match=f"--port {port}: must be between 1 and 65535"):
        sglang.command(model, port=port, backend="triton")
    with pytest.raises(InputError, match="--host no such host"):
        sglang.command(model, host="no such host", backend="triton")


def test_maps_are_checked_before_anything_starts(model, base_folder, tmp_path):
    for ids, message in (([5, 400], "id 400 is outside"), ([-1], "id -1 is outside")):
        with pytest.raises(InputError, match=message):
            sglang.command(model, token_map=a_map(tmp_path, ids), backend="triton")
    with pytest.raises(InputError, match="zh.pt: no such token map"):
        sglang.command(model, token_maps=f"en={a_map(tmp_path)},zh={tmp_path}/zh.pt", backend="triton")
    with pytest.raises(InputError, match="--token-maps with --enable-dp-attention"):
        flags = ["--dp", "2", "--enable-dp-attention"]
        sglang.command(model, token_maps=f"en={a_map(tmp_path)}", flags=flags, backend="triton")
    beside = {"tokenizer": {"name": "other", "sha256_of_vocabulary": "f00", "ids": 30}}
    path = a_map(tmp_path)
    Path(path).with_suffix(".json").write_text(json.dumps(beside))
    for maps in ({"token_map": path}, {"token_maps": f"en={path}"}):
        with pytest.raises(InputError, match="made for another tokenizer"):
            sglang.command(str(base_folder), backend="triton", **maps)


@pytest.mark.parametrize(
    "changes, given, message",
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, "export with fastmtp.export, or --no-spec"),
        ({"num_nextn_predict_layers": None}, {}, "num_nextn_predict_layers is None, must be 1"),
        ({}, {"token_map": "/nowhere/en.pt"}, "no such token map"),
        ({}, {"token_map": "/nowhere/en.pt", "num_steps": 0}, "nothing to shorten"),
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
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('child', flush=True); time.sleep(60)"
    )
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}], "
        f"stdout=subprocess.PIPE);"
        f"p.stdout.readline(); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(0.3);"
        f"sys.argv = ['x', '--port', '{port}']; sys.path.insert(0, {str(HERE / 'helpers')!r}); import "
        f"stand_in; stand_in.main()"
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
        # a shell starts background jobs with SIGINT ignored, and Python then leaves it so
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; from pathlib import Path; from fastmtp import serve;"
        f"serve.serve([sys.executable, {str(HERE / 'helpers' / 'stand_in.py')!r}, '--port', '{port}'], "
        f"{port}, Path({str(tmp_path / 'log')!r}))"
    )
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    while "Ctrl-C stops it" not in (line := child.stdout.readline()):
        assert line, "ended before it was ready"
    child.send_signal(sign)
    rest = child.communicate(timeout=20)[0]
    assert child.returncode == 0 and rest.strip() == "stopped"
    assert not process.answers(f"http://127.0.0.1:{port}/health")


def test_the_api_key_reaches_the_server_and_nothing_else(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    monkeypatch.setattr(serve, "sglang_version", lambda: "0.5.17")
    calls = []
    monkeypatch.setattr(serve, "serve", lambda *args: calls.append(args))
    serve.main(["--model", model, "--api-key", "s3cret", "--host", "::1"])
    monkeypatch.setenv("FASTMTP_API_KEY", "fr0m-outside")
    serve.main(["--model", model])
    shown = capsys.readouterr()
    for (line, _, log, _, _, secret, _), key in zip(calls, ("s3cret", "fr0m-outside"), strict=True):
        assert line[-1] == f"--api-key={key}" and secret == key
        assert key not in shown.out + shown.err and shown.out.count("--api-key=***") == 2
        assert log.parent.stat().st_mode & 0o777 == 0o700
    assert calls[0][2] != calls[1][2] and calls[0][4] == "::1"
    with pytest.raises(InputError, match="--api-key: is empty"):
        serve.main(["--model", model, "--api-key", ""])


def test_a_secret_is_blacked_out_in_the_log(tmp_path):
    code = "import sys; print('args:', sys.argv); raise SystemExit(3)"
    line = [sys.executable, "-c", code, "--api-key=s3cret"]
    with pytest.raises(process.ServerError) as caught:
        with process.Server(line, free_port(), tmp_path / "log", secret="s3cret"):
            pass
    text = (tmp_path / "log").read_text()
    assert "s3cret" not in text + str(caught.value) and "--api-key=***" in text
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "host, url",
    [("::1", "http://[::1]:5"), ("::", "http://[::1]:5"), ("0.0.0.0", "http://127.0.0.1:5")]
    + [("localhost", "http://localhost:5"), ("127.0.0.1", "http://127.0.0.1:5")],
)
def test_where_a_server_is_asked(host, url):
    assert process.Server(["false"], 5, Path("log"), host=host).url == url


def test_a_server_on_ipv6_is_awaited_there(tmp_path):
    code = (
        "import http.server as h, socket, sys\n"
        "class S(h.HTTPServer): address_family = socket.AF_INET6\n"
        "class A(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "S(('::1', int(sys.argv[1])), A).serve_forever()\n"
    )
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip("no IPv6 here")
    line = [sys.executable, "-c", code, str(port)]
    with process.Server(line, port, tmp_path / "log", wait=30, host="::1", stop_patience=2) as server:
        assert process.answers(f"http://[::1]:{port}/health") and server.env["no_proxy"].endswith("::1")
        with pytest.raises(InputError, match=f"port {port} is taken"):
            process.Server(["false"], port, tmp_path / "other", host="::1").start()


def test_main_prints_the_command_and_names_what_is_wrong(model, capsys, monkeypatch):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "triton")
    serve.main(["--model", model, "--dry-run", "--", "--cuda-graph-max-bs", "1"])
    assert capsys.readouterr().out.strip().endswith("--cuda-graph-max-bs-decode 1")
    with pytest.raises(InputError, match="--num-steps 0"):
        serve.main(["--model", model, "--num-steps", "0"])
    with pytest.raises(InputError, match="--tp must be at least 1, not 0"):
        serve.main(["--model", model, "--tp", "0"])
    with pytest.raises(SystemExit) as caught:
        serve.main(["--model", model, "--mem-fraction-static", "0.7"])
    assert caught.value.code == 2


@pytest.mark.parametrize("own", [[], ["--", "--mem-fraction-static", "0.5"]])
def test_the_script_adds_the_single_stream_flags_unless_given_others(own, model):
    env = {**os.environ, "PYTHON": sys.executable}
    found = subprocess.run(
        [
            "sh",
            str(HERE.parent / "scripts" / "serve.sh"),
            "--model",
            model,
            "--engine",
            "sglang",
            "--dry-run",
            *own,
        ],
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
