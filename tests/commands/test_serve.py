"""The serve command and a server's life: readiness, death, hanging start, Ctrl-C (stand-ins on
loopback).
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.serving import exported
from helpers.stand_in import free_port

from fastmtp import serve
from fastmtp.cli import InputError
from fastmtp.engines import process, sglang, vllm

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    """The engine tests of this machine may have installed one."""
    monkeypatch.setattr(vllm, "find_python", lambda: None)


@pytest.fixture
def model(tmp_path):
    return exported(tmp_path / "model")


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


def test_a_dead_server_s_error_is_found_above_its_traceback(tmp_path):
    """An engine wraps the cause twice, and ends with frames that say nothing."""
    code = (
        "import sys\n"
        "print('loading')\n"
        "for n in range(40): print(f'  File \"engine.py\", line {n}, in start')\n"
        "print('(Worker pid=7) ERROR 11-27 07:55:50 [core.py:12] ValueError: Decrease KVCACHE_SPACE')\n"
        "print('(Engine pid=6) ERROR 11-27 07:55:51 [core.py:13] RuntimeError: Worker failed')\n"
        "print('RuntimeError: Worker failed')\n"
        "for n in range(40): print(f'  File \"other.py\", line {n}, in start')\n"
        "sys.exit(3)\n"
    )
    with pytest.raises(process.ServerError) as caught:
        with process.Server([sys.executable, "-c", code], free_port(), tmp_path / "log"):
            pass
    first, *lines = str(caught.value).splitlines()
    assert first == f"the server ended with exit code 3; errors in {tmp_path / 'log'}, and its end:"
    causes = ["  | ValueError: Decrease KVCACHE_SPACE", "  | RuntimeError: Worker failed", "  | ..."]
    assert lines[:3] == causes and lines[3:] == [
        f'  |   File "other.py", line {n}, in start' for n in range(35, 40)
    ]


def test_asking_a_free_port_is_never_answered_by_oneself(monkeypatch):
    """The system may give a client the port that it asks for: TCP then connects it to itself."""
    port = free_port()
    with socket.socket() as alone:
        alone.bind(("127.0.0.1", port))
        alone.connect(("127.0.0.1", port))  # nobody listens, and yet
        alone.sendall(b"GET /health")
        assert alone.recv(20) == b"GET /health"
    port, bind = free_port(), socket.socket.bind
    assert not process.listens("127.0.0.1", port)
    monkeypatch.setattr(socket.socket, "bind", lambda probe, _: bind(probe, ("127.0.0.1", port)))
    assert not process.listens("127.0.0.1", port)


def test_what_does_not_speak_http_is_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(connection.recv(1000))

        thread = threading.Thread(target=echo)
        thread.start()
        assert not process.answers(f"http://127.0.0.1:{port}/health")
        thread.join()


def test_free_ports_are_none_that_a_client_is_given():
    ports = process.free_ports(40)
    assert len({*ports}) == 40 and max(ports) < 32768
    assert not any(process.listens("127.0.0.1", port) for port in ports)


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
    assert "--speculative-num-steps 3" in found.stdout and "--port 30000" in found.stdout


@pytest.mark.parametrize(
    "option, steps, alone",
    [(["--tree", "4,5,16"], 5, True), (["--adaptive"], 7, False), (["--num-steps", "2"], 2, True)],
)
def test_the_script_leaves_the_steps_to_trees_and_tables(option, steps, alone, model):
    line = ["sh", str(HERE.parent / "scripts" / "serve.sh"), "--model", model, "--engine", "sglang"]
    line += ["--dry-run", *option]
    found = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert found.returncode == 0, found.stderr
    assert f"--speculative-num-steps {steps} " in found.stdout
    assert ("--max-running-requests 1 " in found.stdout) == alone
