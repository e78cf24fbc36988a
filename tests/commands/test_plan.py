"""A plan from answers and costs, on a tiny model; serving with it, and plans made for something else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.serving import value
from helpers.tiny import save_folder

from fastmtp import plan, serve
from fastmtp.budget.shapes import shape_of
from fastmtp.checkpoint import HEAD_FILE
from fastmtp.cli import InputError
from fastmtp.engines import sglang, vllm
from fastmtp.planning.costs import CostTable, Drafts, Setting
from fastmtp.reference.model import load
from fastmtp.reference.ranks import measure_drafted
from fastmtp.reference.speculative import generate
from fastmtp.reference.teacher_forced import measure, pooled
from fastmtp.tau import Acceptance
from fastmtp.trees.tree import DynamicTree

TREE = DynamicTree(3, 2, 6)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, eight of its own answers, a map of 40 tokens and a table of costs."""
    folder = tmp_path_factory.mktemp("plan")
    model = load(str(save_folder(folder / "model")))
    size = model.net.vocab_size
    rows = []
    for n in range(8):
        prompt = [5 + n, 7, 11 + n % 3]
        rows.append({"prompt_ids": prompt, "output_ids": generate(model, prompt, 12, 0).ids})
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.save(torch.arange(40), folder / "small.pt")
    table = CostTable(shape_of(str(folder / "model")), "a card", "0.5.17")
    fast, triton = Setting(), Setting(("--attention-backend", "triton"), (("SGLANG_X", "1"),))
    for streams, load_ms in ((1, 0.0), (8, 4.0), (64, 60.0)):
        table.add(fast, Drafts(0, 1, 1, size), streams, 10.0 + load_ms / 10)
        for rows_of_head in (32, size):
            table.add(fast, Drafts(1, 1, 2, rows_of_head), streams, 10.1 + load_ms + rows_of_head / 1000)
            table.add(fast, Drafts(3, 1, 4, rows_of_head), streams, 10.3 + load_ms + rows_of_head / 1000)
            table.add(triton, Drafts(2, 3, 6, rows_of_head), streams, 1.0 + load_ms + rows_of_head / 1000)
    table.save(folder / "costs.json")
    return folder


def arguments(place, *more, out="plan.json"):
    fixed = ["--model", place / "model", "--data", place / "answers.jsonl", "--costs", place / "costs.json"]
    return [*map(str, fixed), "--token-map", str(place / "small.pt"), "--device", "cpu"] + [
        "--out",
        str(place / out),
        *more,
    ]


@pytest.fixture(scope="module")
def planned(place):
    plan.main(arguments(place))
    return json.loads((place / "plan.json").read_text())


def test_the_best_is_what_tau_and_costs_say(place, planned):
    model, samples = load(str(place / "model")), []
    for line in (place / "answers.jsonl").read_text().splitlines()[1::2]:  # the judging half
        samples.append(json.loads(line))
    small = torch.arange(40)
    answers = [sample["output_ids"] for sample in samples]
    drafted = measure_drafted(model, samples, TREE, {"small": small})
    for row in planned["best"]:
        name = "small" if row["token_map"] else "full"
        if row["topk"] > 1:
            expected = Acceptance.over(answers, drafted[name]).accept_length
        else:
            expected = pooled(measure(model, samples, row["num_steps"], {"small": small}), name).accept_length
        assert row["tau"] == pytest.approx(expected)
        assert row["tokens_per_s"] == pytest.approx(1000 * expected / row["ms_per_cycle"])
        assert row["speedup"] == pytest.approx(row["tokens_per_s"] / 100)
    best = planned["best"][0]
    assert (best["topk"], best["num_steps"], best["nodes"]) == (3, 2, 6)
    assert best["ms_per_cycle"] == pytest.approx(1.04) and best["flags"] == ["--attention-backend", "triton"]
    speeds = [row["tokens_per_s"] for row in planned["best"]]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) == 5
    assert (place / "plan.run.json").exists() or (place / "plan.json.run.json").exists()


def test_the_same_plan_twice(place, planned):
    plan.main(arguments(place, out="again.json"))
    again = json.loads((place / "again.json").read_text())
    assert again == planned


def served(place, capsys, *options):
    serve.main(["--model", str(place / "model"), "--plan", str(place / "plan.json"), "--dry-run", *options])
    return capsys.readouterr()


@pytest.fixture
def ready(monkeypatch):
    monkeypatch.setattr(sglang, "attention_backend", lambda: "fa3")
    monkeypatch.setattr(vllm, "find_python", lambda: None)


def test_serving_with_a_plan(place, planned, ready, capsys):
    shown = served(place, capsys)
    line = shown.out.split()
    assert value(line, "--speculative-eagle-topk") == "3" and value(line, "--speculative-num-steps") == "2"
    assert value(line, "--speculative-num-draft-tokens") == "6" and line[0] == "SGLANG_X=1"
    assert value(line, "--speculative-token-map") == str(place / "small.pt")
    assert value(line, "--attention-backend") == "triton" and "plan: tree 3,2,6, small, tau" in shown.err
    own = served(place, capsys, "--", "--attention-backend", "flashinfer").out.split()
    assert value(own, "--attention-backend") == "flashinfer" and own.count("--attention-backend") == 1


def test_steps_that_change_with_the_load(place, planned, ready, capsys):
    chain = planned["chain"]
    assert set(chain["steps_by_streams"]) == {"1", "8", "64"} and chain["flags"] == []
    assert chain["steps_by_streams"]["64"] == 0, "a cycle of 70 ms against 16 ms"
    content = json.loads((place / "plan.json").read_text())
    content["chain"]["steps_by_streams"] = {"1": 0}
    (place / "none.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="no chain that pays"):
        served(place, capsys, "--plan", str(place / "none.json"), "--adaptive")
    (place / "none.json").unlink()


def test_a_table_of_steps_is_written_for_sglang(place, planned, ready, capsys):
    content = json.loads((place / "plan.json").read_text())
    content["chain"]["steps_by_streams"] = {"1": 5, "8": 2, "64": 0}
    (place / "steps.json").write_text(json.dumps(content))
    shown = served(place, capsys, "--plan", str(place / "steps.json"), "--adaptive")
    line = shown.out.split()
    table = json.loads(Path(value(line, "--speculative-adaptive-config")).read_text())
    assert {n: entry["candidate_steps"] for n, entry in table.items()} == {"1": [5], "8": [2], "64": [0]}
    assert value(line, "--speculative-num-steps") == "5" and value(line, "--attention-backend") == "fa3"
    assert "plan: steps 5 from 1 requests on, 2 from 8 requests on, 0 from 64" in shown.err


@pytest.mark.parametrize(
    "options, message",
    [
        ("--num-steps 3", "--plan with --num-steps"),
        ("--tree 4,3,16", "--plan with --tree"),
        ("--no-spec", "--plan with --no-spec"),
        ("--token-map x.pt", "--plan with --token-map"),
        ("--engine vllm", "made from SGLang's costs"),
    ],
)
def test_what_contradicts_a_plan(place, planned, ready, capsys, options, message):
    with pytest.raises(InputError, match=message):
        served(place, capsys, *options.split())


def test_a_plan_for_something_else_is_refused(place, planned, ready, tmp_path, capsys):
    other = tmp_path / "other"
    for name in ("model", "small.pt", "plan.json"):
        source, target = place / name, other / name
        other.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    head = other / "model" / (HEAD_FILE if (other / "model" / HEAD_FILE).exists() else "model.safetensors")
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(data)
    with pytest.raises(InputError, match="plan.json: made for something else .*other content"):
        served(other, capsys)
    content = json.loads((place / "plan.json").read_text())
    moved = tmp_path / "moved.pt"
    for row in content["best"]:
        row["token_map"] = str(moved)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    (tmp_path / "model").symlink_to(place / "model")
    with pytest.raises(InputError, match="moved.pt is gone"):
        served(tmp_path, capsys)
    torch.save(torch.arange(41), moved)
    with pytest.raises(InputError, match="token map: other content"):
        served(tmp_path, capsys)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="not a plan"):
        served(tmp_path, capsys)


def test_what_cannot_be_planned(place, tmp_path):
    for more, message in (
        (["--streams", "100"], "--streams 100: the table of costs"),
        (["--limit", "3"], "3 answers; a plan needs at least 4"),
        (["--token-map", str(place / "small.pt")], "small' is taken"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            plan.main(arguments(place, *more, out="none.json"))
        assert "\n" not in str(caught.value) and not (place / "none.json").exists()
