"""A prompt that cannot be asked is a row in the list of failures; the others are answered."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.stand_in import StandIn

from fastmtp import checkout, distill
from fastmtp.cli import InputError

pytestmark = pytest.mark.usefixtures("hurry")
WAYS = ["server", "in process"]
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def checked(test: str) -> str:
    """A ChatML template that tests every message first."""
    return "{% for m in messages %}" + test + TURN + "{% endfor %}" + END


NO_SYSTEM = checked("{% if m['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}")
TURN_BY_TURN = checked(
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
)
BROKEN = checked("{% if 'x' in m['content'] %}{{ m['tools']['first'].name }}{% endif %}")
DEAF = "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + END


@pytest.fixture
def place(tmp_path, base_folder, monkeypatch):
    """A folder of its own with a model folder that a test may change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_folder, "model", copy_function=os.link)
    return tmp_path


def template(text: str | None) -> None:
    path = Path("model/chat_template.jinja")
    path.unlink(missing_ok=True)
    config = Path("model/tokenizer_config.json")
    settings = json.loads(config.read_text())
    settings.pop("chat_template", None)
    config.unlink()
    config.write_text(json.dumps(settings))
    if text:
        path.write_text(text)


def chat(*turns: str, name: str = "odd") -> dict:
    """`s:text` is a system turn, `u:text` the user's, `a:text` an answer."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"id": name, "messages": [{"role": roles[t[0]], "content": t[2:]} for t in turns]}


def ask(*rows: dict) -> None:
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(way: str | StandIn, *words: str, model: str = "model", out: str = "out.jsonl") -> list[dict]:
    """Distill; the answers. `way` "server" starts one."""
    line = ["--model", model, "--prompts", "prompts.jsonl", "--max-new-tokens", "8", "--out", out, *words]
    if way == "server":
        with StandIn() as server:
            return run(server, *words, model=model, out=out)
    if isinstance(way, StandIn):
        line += ["--server", way.url]
    else:
        line += ["--device", "cpu", "--dtype", "float32"]
    try:
        distill.main(line)
    except SystemExit as end:
        assert isinstance(end.code, str) and "got no answer" in end.code
    return rows_of(out)


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


GOOD = [{"id": f"good {n}", "prompt": f"what is {n}?"} for n in range(3)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "text, odd, reason",
    [
        (
            NO_SYSTEM,
            chat("s:You are", "u:what"),
            "cannot be asked: the chat template refuses this chat (no system turn here)",
        ),
        (NO_SYSTEM, chat("u:one", "a:", "s:late", "u:two"), "no system turn here"),
        (TURN_BY_TURN, chat("u:one", "u:two"), "(roles must alternate"),
        (BROKEN, chat("u:an x"), "cannot be asked: the chat template "),
        (DEAF, chat("s:Answer in verse", "u:what"), "a system message that the chat template leaves out"),
        (None, chat("u:one", "a:", "u:" + "long " * 400), "context leaves"),
    ],
    ids=["system", "late system", "order", "broken template", "left out", "second turn too long"],
)
def test_a_chat_that_the_model_cannot_be_asked_is_a_failure_of_its_own(place, way, text, odd, reason):
    if text:
        template(text)
    ask(GOOD[0], odd, *GOOD[1:])
    made = run(way)
    assert sorted(row["id"] for row in made) == ["good 0", "good 1", "good 2"]
    (failed,) = rows_of("out.failed.jsonl")
    assert failed["id"] == "odd" and reason in failed["reason"] and "\n" not in failed["reason"]


@pytest.mark.parametrize("way", WAYS)
def test_when_all_are_refused_the_run_fails_with_the_reason(place, way):
    template(NO_SYSTEM)
    ask(*(chat("s:You", f"u:{n}", name=f"q{n}") for n in range(4)))
    with pytest.raises(
        InputError, match=r"'q\d': cannot be asked.*no system turn here\) \(and 3 more failed\)"
    ):
        run(way)
    assert not Path("out.jsonl").exists() and len(rows_of("out.failed.jsonl")) == 4


@pytest.mark.parametrize("way", WAYS)
def test_a_model_without_a_template_is_said_at_once(place, way):
    template(None)
    ask(*GOOD)
    with pytest.raises(InputError, match="model: the tokenizer has no chat template"):
        run(way)


def test_long_prompts_in_a_row_are_not_a_dead_server(place):
    ask(*({"prompt": f"{n} " + "long " * 400} for n in range(120)), *GOOD)
    with StandIn() as server:
        assert len(run(server, "--in-flight", "4")) == 3
        server.fault = lambda n, _: "400"  # alive: it says why it will not have them
        ask(*({"prompt": f"short {n}"} for n in range(80)))
        with pytest.raises(InputError, match="HTTP 400.*79 more"):
            run(server, "--in-flight", "4", out="other.jsonl")


def test_answers_are_kept_by_what_the_model_is_not_by_names_and_times(place):
    ask(*GOOD)
    Path("model/run.json").unlink(missing_ok=True)
    with StandIn() as server:
        first = run(server)
        Path("model/run.json").write_text('{"command": "python -m fastmtp.export"}')
        for path in Path("model").iterdir():
            path.touch()
        assert run(server) == first
        Path("model").rename("renamed")
        assert run(server, model="renamed") == first
        shutil.copytree("renamed", "copied")
        assert run(server, model="copied") == first and len(server.bodies) == 3
        settings = json.loads(Path("copied/config.json").read_text()) | {"rope_theta": 1234.0}
        Path("copied/config.json").write_text(json.dumps(settings))
        run(server, model="copied")
        assert len(server.bodies) == 6


def test_two_outputs_in_one_folder_share_nothing(place):
    template(NO_SYSTEM)
    with StandIn() as server:
        ask(*GOOD, chat("s:one", "u:one", name="first"))
        run(server, out="a.jsonl")
        ask(*GOOD[:2], chat("s:two", "u:two", name="second"))
        run(server, out="b.jsonl")
    assert [row["id"] for row in rows_of("a.failed.jsonl")] == ["first"]
    assert [row["id"] for row in rows_of("b.failed.jsonl")] == ["second"]
    for name, count in (("a", 3), ("b", 2)):
        record = json.loads(Path(f"{name}.jsonl.run.json").read_text())
        assert record["config"]["out"] == f"{name}.jsonl" and len(rows_of(f"{name}.jsonl")) == count


@pytest.mark.parametrize("name", ["out.jsonl", "out.failed.jsonl"])
def test_a_file_that_is_not_ours_stays_as_it_is(place, name):
    Path(name).write_text("my notes\n")
    ask(*GOOD)
    with StandIn() as server, pytest.raises(InputError, match=name):
        run(server)
    assert Path(name).read_text() == "my notes\n" and server.bodies == []


def test_the_same_output_twice_at_once_is_refused(place):
    ask(*GOOD)
    code = (
        "import sys; from fastmtp.files import claim; claim('out.jsonl'); print('held', flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": checkout.python_path()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="out.jsonl: another process is writing it"):
            run("server")
        other.communicate(b"\n")
    assert len(run("server")) == 3


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"content": "red", "reasoning_content": "I think"}, "thinking apart from the text"),
        ({"content": "red", "reasoning": "I think"}, "thinking apart from the text"),
        ({"content": None, "tool_calls": [{"function": {"name": "f"}}]}, "`tool_calls` instead of the text"),
        ({"content": "calling", "function_call": {"name": "f"}}, "`function_call` instead of the text"),
        ({"content": None}, "got no text"),
        ({"content": ""}, "got an empty text"),
        ({"content": [{"type": "text", "text": "red"}]}, "got a list instead of a text"),
        ({"content": 7}, "got a int instead of a text"),
        ({"content": "half \ud83d"}, "not valid UTF-8"),
    ],
)
def test_of_an_openai_answer_no_part_is_lost(place, tokenizer, message, reason):
    ask(GOOD[0])
    with StandIn() as server:
        server.message, server.gives_ids = {"role": "assistant", **message}, False
        with pytest.raises(InputError, match=reason):
            run("", "--server", server.url + "/v1")
        server.gives_ids = True  # with ids, they are the answer, whatever the text beside them
        distill.main(
            ["--model", "model", "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--max-new-tokens", "8"]
            + ["--server", server.url + "/v1"]
        )
    (row,) = rows_of("out.jsonl")
    assert row["output_ids"] == [7, 8, tokenizer.eos_token_id] and "None" not in row["messages"][1]["content"]


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_of_another_model_are_refused(place, monkeypatch, wrong):
    import helpers.stand_in

    monkeypatch.setattr(helpers.stand_in, "answer_ids", lambda *_: ([5, wrong], "stop"))
    ask(GOOD[0])
    with pytest.raises(InputError, match=f"token id {wrong}, beyond the model's"):
        run("server")


def test_the_key_is_sent_and_never_recorded(place, monkeypatch):
    ask(GOOD[0])
    words = ["fastmtp", "--api-key", "secret-1", "--api-key=secret-2"]
    monkeypatch.setattr(sys, "argv", words)
    with StandIn() as server:
        run(server, "--api-key", "secret-1")
        monkeypatch.setenv("OPENAI_API_KEY", "secret-3")
        run(server, out="b.jsonl")
    assert server.keys == ["Bearer secret-1", "Bearer secret-3"]
    for record in ("out.jsonl.run.json", "b.jsonl.run.json"):
        assert "secret" not in Path(record).read_text() and "***" in Path(record).read_text()


def test_a_proxy_of_the_environment_is_not_asked(place, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    ask(*GOOD)
    assert len(run("server")) == 3


def test_a_server_at_an_ipv6_address(place, monkeypatch):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(StandIn, "address_family", socket.AF_INET6)
    monkeypatch.setattr(StandIn, "url", property(lambda self: f"http://[::1]:{self.server_address[1]}"))
    monkeypatch.setattr(StandIn, "server_bind", _bind_to_loopback)
    ask(*GOOD)
    assert len(run("server")) == 3


def _bind_to_loopback(server) -> None:
    server.socket.bind(("::1", 0))
    server.server_address = server.socket.getsockname()
