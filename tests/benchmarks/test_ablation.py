"""Arms resolve to complete recipes that differ where they say; the table is that of the counts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.ablation import run as ablation
from benchmarks.ablation.run import depends_on, keep_head, main, read_config, resolve, training_facts
from benchmarks.ablation.table import report
from fastmtp.checkpoint import read_head, save_head
from fastmtp.cli import InputError
from fastmtp.train import check

CONFIG = "configs/ablation.yaml"


def arguments(base: Path, out: Path):
    for name in ("self", "source", "heldout", "answers"):
        (out / f"{name}.jsonl").write_text("{}\n")
    return SimpleNamespace(
        model=str(base),
        self_data=str(out / "self.jsonl"),
        source_data=str(out / "source.jsonl"),
        held_out=str(out / "heldout.jsonl"),
        answers=str(out / "answers.jsonl"),
        out=str(out / "arms"),
        leave_out=[],
        dtype="float32",
    )


def test_the_arms_are_those_that_the_table_is_about():
    arms = read_config(CONFIG)["arms"]
    assert list(arms)[:3] == ["vanilla", "fixed", "self"]
    assert (
        arms["self"]["mtp_attention"] == "paper"
        and arms["fixed"]["data"] == arms["vanilla"]["data"] == "source"
    )


@pytest.mark.parametrize("name", list(yaml.safe_load(Path(CONFIG).read_text())["arms"]))
def test_every_arm_is_a_recipe_that_passes_the_check(name, base_folder, tmp_path):
    plugin = pytest.importorskip("fastmtp.swift_plugin")
    args, config = arguments(base_folder, tmp_path), read_config(CONFIG)
    recipe = resolve(config, name, args, ["--max_steps", "4"])
    assert recipe["max_steps"] == 4 and recipe["model_kwargs"]["mtp_eval_data"] == args.held_out
    assert recipe["dataset"] == [
        args.source_data if config["arms"][name]["data"] == "source" else args.self_data
    ]
    check({**recipe, "model": str(base_folder)}, plugin.swift_keys(), name)


def test_arms_differ_only_where_they_say(base_folder, tmp_path):
    args, config = arguments(base_folder, tmp_path), read_config(CONFIG)
    paper, exact = (resolve(config, name, args, []) for name in ("self", "exact"))
    assert (
        paper["model_kwargs"].pop("mtp_attention") == "paper"
        and exact["model_kwargs"].pop("mtp_attention") == "exact"
    )
    assert paper.pop("output_dir").endswith("self/run") and exact.pop("output_dir").endswith("exact/run")
    del paper["model"], exact["model"]
    assert paper == exact


@pytest.fixture
def training(monkeypatch):
    """Replaces `swift sft`: each call leaves a log and the start head, moved by a tenth, as the best
    checkpoint.
    """
    calls = []

    def fake(recipe):
        calls.append(recipe)
        out = Path(recipe["output_dir"])
        head = {name: tensor + 0.1 for name, tensor in read_head(recipe["model"]).items()}
        (out / "best-checkpoint").mkdir(parents=True)
        save_head(out / "best-checkpoint", head)
        rows = [
            {"global_step/max_steps": "2/4", "loss": 1.0},
            {"global_step/max_steps": "2/4", "eval_tau": 1.5, "eval_rate_1": 0.4},
            {
                "global_step/max_steps": "4/4",
                "train_runtime": 8.0,
                "num_input_tokens_seen": 4000,
                "epoch": 0.5,
            },
        ]
        (out / "logging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(ablation, "train", fake)
    monkeypatch.setattr(ablation, "check", lambda *_: None)
    monkeypatch.setattr(ablation, "swift_keys", set)
    return calls


def words(args, *more):
    names = dict(
        model=args.model, self_data=args.self_data, source_data=args.source_data, held_out=args.held_out
    )
    flags = [w for k, v in names.items() for w in ("--" + k.replace("_", "-"), v)]
    return [*flags, "--answers", args.answers, "--out", args.out, *more]


def test_arms_start_from_vanilla_and_are_kept(training, base_folder, tmp_path, monkeypatch):
    args = arguments(base_folder, tmp_path)
    counted = {
        "tau": {
            k: {"mt_bench": {"histogram": [2, 3] + [0] * (int(k) - 1), "samples": [[8, 5]]}} for k in "1357"
        }
    }
    monkeypatch.setattr(ablation, "figures", lambda *_: counted)
    main(words(args, "--arms", "vanilla,self", "--max_steps", "4"))
    out = Path(args.out)
    vanilla, tuned = (load_file(out / name / "head" / "model.safetensors") for name in ("vanilla", "self"))
    base = read_head(base_folder)
    for name, tensor in base.items():
        torch.testing.assert_close(vanilla[name], (tensor + 0.1).bfloat16())
        torch.testing.assert_close(tuned[name].float(), vanilla[name].float() + 0.1, rtol=1e-2, atol=1e-2)
    assert json.loads((out / "self" / "result.json").read_text())["curve"] == [
        {"step": 2, "eval_tau": 1.5, "eval_rate_1": 0.4}
    ]
    main(words(args, "--arms", "vanilla,self", "--max_steps", "4"))
    assert len(training) == 2, "finished arms were trained again"
    main(words(args, "--arms", "self", "--max_steps", "5"))
    assert len(training) == 3, "another recipe was taken for the same"
    Path(args.self_data).write_text('{"other": 1}\n')
    main(words(args, "--arms", "self", "--max_steps", "5"))
    assert len(training) == 4, "other data was taken for the same"
    table = json.loads((out / "table.json").read_text())
    assert list(table) == ["vanilla", "self"] and table["vanilla"]["at"]["3"]["tau"] == {
        "mt_bench": 1.6,
        "all": 1.6,
    }


def test_wrong_use(base_folder, tmp_path, training):
    args = arguments(base_folder, tmp_path)
    with pytest.raises(InputError, match="no arm 'none'"):
        main(words(args, "--arms", "none"))
    with pytest.raises(InputError, match="--vanilla"):
        main(words(args, "--arms", "self"))
    (tmp_path / "bad.yaml").write_text("arms: {self: {data: other, about: x}}\nrecipe: {}\n")
    with pytest.raises(InputError, match="'self' needs"):
        main(words(args, "--config", str(tmp_path / "bad.yaml")))


def test_figures_are_measured_again_for_other_answers_without_another_training(
    training, base_folder, tmp_path, monkeypatch, capsys
):
    args, measured = arguments(base_folder, tmp_path), []
    monkeypatch.setattr(ablation, "figures", lambda *given: measured.append(given) or {"tau": {}})
    monkeypatch.setattr(ablation, "report", lambda *_: "")
    main(words(args, "--arms", "vanilla"))
    arm = Path(args.out) / "vanilla"
    before = (arm / "head" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "answers.jsonl").write_text('{"other": 1}\n')
    monkeypatch.setattr(ablation, "train", lambda recipe: training.append(recipe))  # finished: keeps its run
    main(words(args, "--arms", "vanilla"))
    assert len(measured) == 2 and "answers: other content" in capsys.readouterr().out
    assert (arm / "run" / "logging.jsonl").exists() and (arm / "head" / "model.safetensors").exists()
    assert before <= (arm / "head" / "model.safetensors").stat().st_mtime_ns


def test_a_folder_of_others_is_refused_and_stays(training, base_folder, tmp_path):
    """A folder with the name of an arm is the user's until our record says otherwise."""
    args = arguments(base_folder, tmp_path)
    notes = Path(args.out) / "vanilla" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(InputError, match="vanilla: holds other files"):
        main(words(args, "--arms", "vanilla"))
    assert notes.read_text() == "mine" and not training


def test_a_file_put_into_an_arm_later_outlives_another_training(training, base_folder, tmp_path, monkeypatch):
    args = arguments(base_folder, tmp_path)
    monkeypatch.setattr(ablation, "figures", lambda *_: {"tau": {}})
    monkeypatch.setattr(ablation, "report", lambda *_: "")
    main(words(args, "--arms", "vanilla"))
    notes = Path(args.out) / "vanilla" / "notes.txt"
    notes.write_text("mine")
    main(words(args, "--arms", "vanilla", "--max_steps", "7"))
    assert len(training) == 2 and notes.read_text() == "mine"


def test_what_a_training_depends_on(base_folder, tmp_path):
    """The recipe, the start head and the data by content; names and places of files do not matter."""
    args = arguments(base_folder, tmp_path)
    data, head = tmp_path / "x", tmp_path / "head"
    data.write_text("1")
    recipe = {"dataset": [str(data)], "model_kwargs": {"mtp_num_steps": 1}, "output_dir": "a"}
    keep_head(base_folder, head)
    first = depends_on(recipe, head, args)
    copy = tmp_path / "copy"
    copy.write_text("1")
    assert depends_on(recipe | {"dataset": [str(copy)], "output_dir": "b"}, head, args) == first
    assert depends_on(recipe | {"learning_rate": 1}, head, args) != first
    assert depends_on(recipe, base_folder, args) != first
    data.write_text("2")
    assert depends_on(recipe, head, args) != first


def test_kept_heads_are_bfloat16(base_folder, tmp_path):
    keep_head(base_folder, tmp_path / "head")
    kept, base = read_head(tmp_path / "head"), read_head(base_folder)
    assert all(torch.equal(kept[name], tensor.bfloat16()) for name, tensor in base.items())


def test_facts_of_a_log(tmp_path):
    rows = [{"global_step/max_steps": f"{i}/9", "eval_tau": 1 + i / 10} for i in (3, 6, 9)]
    rows.append(
        {"global_step/max_steps": "9/9", "train_runtime": 3.0, "num_input_tokens_seen": 90, "epoch": 1.5}
    )
    (tmp_path / "logging.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"last_model_checkpoint": "x"}])
    )
    facts = training_facts(tmp_path)
    assert (facts["steps"], facts["seconds"], facts["tokens"], facts["epochs"]) == (9, 3.0, 90, 1.5)
    assert [row["step"] for row in facts["curve"]] == [3, 6, 9]


def test_the_table_by_hand(tmp_path):
    """Two answers of ten tokens; one arm needs 5 + 5 passes, the other 4 + 4: tau 2.0 and 2.5, a gain of a
    quarter.
    """
    for name, passes in (("self", 5), ("exact", 4)):
        (tmp_path / name).mkdir()
        row = {
            "a": {"histogram": [1, passes - 1], "samples": [[10, passes]]},
            "b": {"histogram": [0, passes], "samples": [[10, passes]]},
        }
        facts = dict(
            steps=4, epochs=1.0, tokens=2_000_000, seconds=10.0, curve=[{"step": 2, "eval_tau": 1.25}]
        )
        (tmp_path / name / "result.json").write_text(
            json.dumps({"arm": name, "about": name, "tau": {"1": row}} | facts)
        )
    text = report(tmp_path, ["self", "missing", "exact"])
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["self"]["at"]["1"]["tau"] == {"a": 2.0, "b": 2.0, "all": 2.0}
    assert found["exact"]["at"]["1"]["gain"] == pytest.approx(0.25)
    assert found["exact"]["at"]["1"]["position_rates"] == [7 / 8] and "gain" not in found["self"]["at"]["1"]
    assert "| exact | +25.0 % (+25.0 to +25.0) |" in text and "4.0M tokens read in all" in text
    assert "| exact | 4 | 1.0 | 2.0M | 10 | 200,000 |" in text and "- self: 2: 1.250" in text
