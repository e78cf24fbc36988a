"""The whole table: arms, servers started and stopped (stand-ins), drift, resume, charts; and without any
server.
"""

import json
import os
import shutil
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.stand_in import PAUSE, free_port
from helpers.tiny import chatml_tokenizer

from evaluation import agreement, charts, lossless, plan, run, table
from evaluation.arms import parse_arms
from evaluation.plan import REPEAT
from fastmtp import checkpoint
from fastmtp.cli import InputError
from fastmtp.engines import process, sglang
from fastmtp.files import check_output
from fastmtp.reference import model as model_module
from fastmtp.reference import speculative
from fastmtp.tokenizer import load_tokenizer
from fastmtp.trees.tree import DynamicTree

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder that passes for an exported model: a config and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    chatml_tokenizer().save_pretrained(folder)
    config = {
        "architectures": ["MiMoForCausalLM"],
        "num_nextn_predict_layers": 1,
        "vocab_size": 65,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    for name in ("nq_qa", "nq_rag", "cnn_dm"):
        rows = [{"turns": [f"what is w{n} {'red ' * len(name)}"]} for n in range(6, 12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def started(monkeypatch):
    """SGLang's command line replaced by a stand-in's; the list of what was started."""
    calls = []
    built = sglang.command

    def stand_in(serving, backend=None):
        line = built(serving, backend or "triton")
        if backend is None:
            calls.append(line)
        return [
            sys.executable,
            str(HERE / "helpers" / "stand_in.py"),
            "--port",
            str(serving.port),
            "--num-steps",
            str(serving.num_steps),
        ]

    monkeypatch.setattr(sglang, "command", stand_in)
    monkeypatch.setattr(sglang, "sglang_version", lambda: "0.5.17")
    return calls


def arguments(model, questions, out, *more):
    return [
        "--model",
        model,
        "--question-folder",
        questions,
        "--out",
        str(out),
        "--max-gen-length",
        "30",
        *more,
    ]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_arms(tmp_path):
    path = tmp_path / "en_32k.pt"
    path.write_bytes(b"")
    arms = parse_arms(
        "vanilla:3,fastmtp:1,fastmtp:3+en32k@tree16,fastmtp:3+en32k,fastmtp:2@tree3x8,baseline",
        "m",
        "v",
        [f"en32k={path}"],
    )
    assert [(a.name, a.model, a.num_steps, a.token_map, a.tree) for a in arms] == [
        ("baseline", "m", 0, None, None),
        ("vanilla:3", "v", 3, None, None),
        ("fastmtp:1", "m", 1, None, None),
        ("fastmtp:3+en32k@tree16", "m", 3, str(path), DynamicTree(4, 3, 16)),
        ("fastmtp:3+en32k", "m", 3, str(path), None),
        ("fastmtp:2@tree3x8", "m", 2, None, DynamicTree(3, 2, 8)),
    ]
    assert arms[3].folder == "fastmtp-3+en32k@tree16"


@pytest.mark.parametrize(
    "arms, maps, message",
    [
        ("fastmtp", [], "not baseline, vanilla:K or fastmtp:K"),
        ("fastmtp:0", [], "not baseline"),
        ("fastmtp:3+en", [], "needs --token-map en=PATH"),
        ("vanilla:3", [], "needs --vanilla-model"),
        ("fastmtp:2@tree4x99", [], "draw 20 drafts, so nodes must be at most 21"),
        ("fastmtp:3@tree", [], "not baseline"),
        ("fastmtp:3,fastmtp:3", [], "named twice"),
        ("", [], "empty"),
        ("fastmtp:3", ["en"], "expected NAME=PATH"),
        ("fastmtp:3", ["en=/nowhere.pt"], "no such token map"),
    ],
)
def test_arms_that_cannot_run_say_why(arms, maps, message):
    with pytest.raises(InputError, match=message):
        parse_arms(arms, "m", None, maps)


def test_the_whole_table_over_servers(model, questions, started, tmp_path, capsys):
    out, port = tmp_path / "out", str(free_port())
    more = [
        "--arms",
        "baseline,fastmtp:1,fastmtp:3",
        "--tasks",
        "nq_qa,nq_rag,cnn_dm",
        "--port",
        port,
        "--repeat-questions",
        "3",
    ]
    run.main(arguments(model, questions, out, *more, "--", "--mem-fraction-static=0.5"))
    lines = read(out / "results.jsonl")
    assert [(x["arm"], x["task"]) for x in lines] == [
        (arm, task)
        for arm in ("baseline", "fastmtp:1", "fastmtp:3", REPEAT)
        for task in ("nq_qa", "nq_rag", "cnn_dm")
    ]
    by = {(x["arm"], x["task"]): x for x in lines}
    assert by["baseline", "nq_qa"]["speedup"] == 1.0
    assert by["fastmtp:3", "nq_qa"]["lossless"]["share"] == 1.0
    assert by["fastmtp:3", "nq_qa"]["accept_length"] > by["fastmtp:1", "nq_qa"]["accept_length"] > 1
    assert by[REPEAT, "nq_qa"]["num_questions"] == 3 and by[REPEAT, "nq_qa"]["lossless"]["questions"] == 3
    assert len(started) == 4
    spec = started[2]
    assert (
        spec[spec.index("--speculative-num-steps") + 1] == "3" and "--speculative-algorithm" not in started[0]
    )
    assert "--mem-fraction-static=0.5" in spec and "--mem-fraction-static" not in spec
    assert spec[spec.index("--dtype") + 1] == "bfloat16"
    for name in ("table.json", "table.md", "run.json", "radar.png", "steps.png", "acceptance.png"):
        assert (out / name).stat().st_size > 0
    assert "| fastmtp:3 |" in capsys.readouterr().out
    report = json.loads((out / "table.json").read_text())
    assert set(report["drift"]) == {"nq_qa", "nq_rag", "cnn_dm"}
    spans = report["cells"]["fastmtp:3"]["nq_qa"]["intervals"]
    assert spans["accept_length"][0] <= by["fastmtp:3", "nq_qa"]["accept_length"] <= spans["accept_length"][1]

    # The pictures again, from the figures alone.
    (out / "radar.png").unlink()
    charts.main([str(out)])
    assert (out / "radar.png").exists()
    with pytest.raises(InputError, match="no table.json; give the --out"):
        charts.main([str(tmp_path)])

    # The same command again: no server, the same numbers.
    run.main(arguments(model, questions, out, *more, "--", "--mem-fraction-static=0.5"))
    assert len(started) == 4 and read(out / "results.jsonl") == lines
    # One arm's answers lost: only that arm is asked again.
    (out / "answers" / "fastmtp-1" / "nq_qa.jsonl").unlink()
    run.main(arguments(model, questions, out, *more, "--", "--mem-fraction-static=0.5"))
    assert len(started) == 5 and started[4][started[4].index("--speculative-num-steps") + 1] == "1"


def test_servers_at_once_get_ports_and_memory_of_their_own(model, questions, started, tmp_path):
    more = ["--arms", "baseline,fastmtp:1,fastmtp:2", "--tasks", "nq_qa", "--at-once", "2", "--parallel", "4"]
    out, port = tmp_path / "out", free_port()
    run.main(arguments(model, questions, out, *more, "--port", str(port), "--dtype", "float32"))
    assert [x["arm"] for x in read(out / "results.jsonl")] == ["baseline", "fastmtp:1", "fastmtp:2", REPEAT]
    assert [line[line.index("--port") + 1] for line in started] == [str(port), str(port + 1)] * 2
    for line in started:
        assert line[line.index("--max-total-tokens") + 1] == str(4 * (30 + plan.PROMPT_ROOM))
        assert line.count("--attention-backend") == 1 and "--enable-deterministic-inference" in line
    with pytest.raises(InputError, match="--at-once must be at least 1, not 0"):
        run.main(arguments(model, questions, out, *more, "--at-once", "0"))


def test_a_tree_arm_is_served_and_never_taken_for_another_tree(model, questions, started, tmp_path):
    out = tmp_path / "out"
    for nodes, asked in (("8", True), ("8", False), ("16", True)):
        started.clear()
        more = ["--arms", f"fastmtp:3@tree{nodes}", "--tasks", "nq_qa", "--port", str(free_port())]
        run.main(arguments(model, questions, out, *more))
        assert bool(started) == asked
        (line,) = read(out / "results.jsonl")
        tree = {"topk": 4, "depth": 3, "nodes": int(nodes)}
        assert line["num_steps"] == 3 and line["config"]["fingerprint"]["tree"] == tree
    assert started[0][started[0].index("--speculative-num-draft-tokens") + 1] == "16"


def test_two_cards_and_two_levels_of_streams(model, questions, started, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv(PAUSE, "0.002")
    devices, begin = [], process.Server.start

    def start(server):
        devices.append(server.env["CUDA_VISIBLE_DEVICES"])
        begin(server)

    monkeypatch.setattr(process.Server, "start", start)
    more = ["--arms", "baseline,fastmtp:1,fastmtp:3", "--tasks", "nq_qa,nq_rag,cnn_dm", "--gpus", "2"]
    more += ["--repeat-questions", "2", "--streams", "1,4", "--port", str(free_port())]
    out = tmp_path / "out"
    run.main(arguments(model, questions, out, *more))
    assert devices == ["3", "5"] * 3  # baselines, arms, baselines again
    for line in started:
        assert line[line.index("--max-running-requests") + 1] == "4"
    lines = {(x["arm"], x["task"]): x for x in read(out / "results.jsonl")}
    two = lines["fastmtp:3", "nq_qa"]
    assert two["environment"]["card"] == 1 and two["config"]["fingerprint"]["card"] == 1
    ours = lines["baseline_gpu1", "nq_qa"]["throughput"]
    assert two["speedup"] == pytest.approx(two["throughput"] / ours)
    report = json.loads((out / "table.json").read_text())
    assert report["arms"] == ["baseline", "fastmtp:1", "fastmtp:3"] and set(report["cards"]) == {"0", "1"}
    levels = {(x["arm"], x["streams"]): x for x in read(out / "streams.jsonl")}
    assert set(levels) == {(a, n) for a in report["arms"] for n in (1, 4)}
    assert levels["fastmtp:3", 4]["accept_length"] > levels["fastmtp:1", 4]["accept_length"] > 1
    assert levels["baseline", 4]["throughput"] > levels["baseline", 1]["throughput"]
    assert (out / "streams.png").stat().st_size > 0 and "at a time" in (out / "table.md").read_text()

    # Again: nothing is asked. A level that was lost is measured again, on the arm's own card.
    run.main(arguments(model, questions, out, *more))
    (out / "streams" / "fastmtp-3" / "4.json").unlink()
    run.main(arguments(model, questions, out, *more))
    assert devices[6:] == ["5"]
    more[more.index("2")] = "1"
    with pytest.raises(InputError, match="made under other settings .card: 0 -> none"):
        run.main(arguments(model, questions, out, *more))


def test_a_server_that_dies_at_start_shows_its_last_lines(model, questions, monkeypatch, tmp_path):
    def dying(*_, **__):
        return [sys.executable, "-c", "print('CUDA out of memory'); raise SystemExit(3)"]

    monkeypatch.setattr(sglang, "command", dying)
    monkeypatch.setattr(sglang, "sglang_version", lambda: "0.5.17")
    with pytest.raises(SystemExit) as caught:
        run.main(
            arguments(model, questions, tmp_path / "out", "--tasks", "nq_qa", "--port", str(free_port()))
        )
    assert "exit code 3" in caught.value.code and "CUDA out of memory" in caught.value.code


@dataclass
class Generation:
    ids: list
    verify_passes: int
    histogram: list
    prefill_s: float = 0.001
    decode_s: float = 0.001
    calls: list = field(default_factory=list)


def fake_decoder(monkeypatch, lossless=True):
    """The interface of fastmtp.decoding over made-up tokens; `lossless=False` changes one token when
    drafting.
    """
    calls = []

    def generate(
        model, prompt_ids, max_new_tokens, drafts, temperature=0.0, seed=0, token_map=None, eos_ids=None
    ):
        calls.append((model.loaded, drafts, token_map))
        ids = [6 + (sum(prompt_ids) + n) % 40 for n in range(min(12, max_new_tokens))]
        if drafts and not lossless:
            ids[7] += 1
        passes = 4 if drafts else 0
        histogram = [sum(n % (drafts + 1) == j for n in range(passes)) for j in range(drafts + 1)]
        return Generation(ids, passes, histogram)

    monkeypatch.setattr(
        model_module,
        "load",
        lambda folder, dtype="float32", device="cpu": types.SimpleNamespace(
            tokenizer=load_tokenizer(folder),
            eos_ids={2},
            loaded=(folder, dtype, device),
            net=types.SimpleNamespace(vocab_size=65),
        ),
    )
    monkeypatch.setattr(speculative, "generate", generate)
    return calls


def test_the_same_arms_without_a_server(model, questions, monkeypatch, tmp_path):
    calls = fake_decoder(monkeypatch)
    out = tmp_path / "out"
    more = [
        "--backend",
        "reference",
        "--arms",
        "fastmtp:3,baseline",
        "--tasks",
        "nq_qa",
        "--num-questions",
        "4",
    ]
    run.main(arguments(model, questions, out, *more))
    lines = read(out / "results.jsonl")
    assert [x["arm"] for x in lines] == ["baseline", "fastmtp:3", REPEAT]
    spec = lines[1]
    assert spec["output_tokens"] == 48 and spec["accept_length"] == 48 / 16
    assert spec["position_rates"] == [0.75, 0.5, 0.25] and spec["lossless"]["share"] == 1.0
    assert spec["environment"]["backend"] == "reference" and spec["config"]["dtype"] == "float32"
    assert calls[0] == ((model, "float32", "cpu"), 0, None)
    assert (out / "radar.png").exists()
    check_output(out)  # the record names all that is in the folder, or it could not be replaced


def test_without_a_baseline_there_are_no_claims(model, questions, monkeypatch, tmp_path):
    fake_decoder(monkeypatch)
    out = tmp_path / "out"
    run.main(
        arguments(
            model,
            questions,
            out,
            "--backend",
            "reference",
            "--arms",
            "fastmtp:1,fastmtp:3",
            "--tasks",
            "nq_qa",
        )
    )
    assert [(x["arm"], x["speedup"], x["lossless"]) for x in read(out / "results.jsonl")] == [
        ("fastmtp:1", None, {}),
        ("fastmtp:3", None, {}),
    ]
    assert "No baseline in this run" in (out / "table.md").read_text()
    assert (out / "steps.png").exists() and not (out / "radar.png").exists()
    assert "steps.png" in (out / "table.md").read_text() and "radar.png" not in (out / "table.md").read_text()
    (out / "mine.png").write_bytes(b"mine")
    plain = ("--backend", "reference", "--arms", "baseline", "--tasks", "nq_qa")
    run.main(arguments(model, questions, out, *plain))  # nothing is drawn, and nothing of another table stays
    assert [path.name for path in out.glob("*.png")] == ["mine.png"]
    assert ".png" not in (out / "table.md").read_text()


def test_different_text_in_float32_is_called_out(model, questions, monkeypatch, tmp_path, capsys):
    fake_decoder(monkeypatch, lossless=False)
    run.main(arguments(model, questions, tmp_path / "out", "--backend", "reference", "--tasks", "nq_qa"))
    assert "NOT LOSSLESS in float32: fastmtp:3 on nq_qa: 0 of 6" in capsys.readouterr().out


def test_wrong_use_is_found_before_anything_starts(model, questions, started, tmp_path):
    out = tmp_path / "out"
    for more, message in (
        (["--tasks", "nothing"], "is not a task"),
        (["--backend", "reference", "--parallel", "2"], "one request at a time"),
        (["--num-questions", "0"], "at least 1"),
        (["--model", str(tmp_path / "none")], "no such model folder"),
        (["--tasks", "math_500"], "no files named math_500"),
    ):
        with pytest.raises(InputError, match=message):
            run.main(arguments(model, questions, out, *more))
    assert not started and not out.exists()


def test_warnings_tell_when_not_to_believe():
    config = {"parallel": 4, "dtype": "bfloat16"}
    answered = {"output_tokens": 9, "position_rates": []}
    lossless = {"reference": "baseline", "questions": 80, "identical": 60, "share": 0.75}
    lines = [
        {"arm": "baseline", "task": "t", "num_questions": 80, "lossless": {}, "config": config} | answered,
        {"arm": "fastmtp:3", "task": "t", "num_questions": 8, "lossless": lossless, "config": config}
        | answered,
        {"arm": "fastmtp:1", "task": "t", "num_questions": 80, "lossless": {}, "config": config}
        | {"output_tokens": 9, "position_rates": None},
        {"arm": "fastmtp:2", "task": "t", "num_questions": 80, "lossless": {}, "config": config}
        | {"output_tokens": 0, "position_rates": None},
    ]
    text = "\n".join(table.warnings(lines, {"t": -0.05}))
    for part in (
        "-5.0%",
        "4 requests in flight",
        "Only 8 questions",
        "60 of 80 outputs equal",
        "rates are unknown",
        "is empty",
    ):
        assert part in text
    assert "drift is unknown" in "\n".join(table.warnings(lines, {}))
    assert "No baseline" in "\n".join(table.warnings(lines[1:], {}))


@pytest.fixture
def reference(model, questions, monkeypatch, tmp_path):
    """run(*more) of one small evaluation with the decoder faked; its model may be changed. Gives the number
    of questions asked.
    """
    calls = fake_decoder(monkeypatch)
    folder, head = tmp_path / "model", tmp_path / "model" / checkpoint.HEAD_FILE
    shutil.copytree(model, folder)
    head.write_bytes(b"first")
    map_path = tmp_path / "small.pt"
    torch.save(torch.arange(20), map_path)

    def ask(*more, folder=folder, questions=questions, command=run.main):
        calls.clear()
        options = ["--backend", "reference", "--tasks", "nq_qa", "--arms", "baseline,fastmtp:2+small"]
        maps = ["--token-map", f"small={map_path}"]
        command(arguments(str(folder), questions, tmp_path / "out", *options, *maps, *more))
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
    model, questions, started, monkeypatch, tmp_path
):
    out, port = tmp_path / "out", str(free_port())
    given = arguments(model, questions, out, "--tasks", "nq_qa", "--arms", "baseline", "--port", port)
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
