"""What the stages of the speedrun say: commands that parse, inputs that an earlier stage made, arms."""

import dataclasses
import importlib
import json
import shlex
from pathlib import Path

import pytest

from fastmtp.inputs import resource
from fastmtp.pipeline.speedrun_stages import NAMES, Plan, all_maps, map_sizes, stages, stages_until, words
from fastmtp.pipeline.stages import facts_of


@pytest.fixture
def plan(tmp_path) -> Plan:
    questions = tmp_path / "questions"
    questions.mkdir()
    (questions / "mt_bench.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    return Plan(
        model=str(tmp_path / "model"),
        data=["configs/data/local.yaml"],
        questions=str(questions),
        out=tmp_path / "a run",
        gpus=4,
        recipe="configs/speedrun.yaml",
        recipe_flags=["--learning_rate", "1e-4"],
        steps=3,
        accumulation=8,
        processes=4,
        languages=["en", "zh"],
        prompts=100,
        flags=["--attention-backend", "fa3"],
    )


def by_name(plan: Plan) -> dict:
    return {stage.name: stage for stage in stages(plan)}


@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_every_stage_is_a_command_whose_arguments_parse(plan, gpus):
    made = by_name(dataclasses.replace(plan, gpus=gpus, processes=max(1, gpus)))
    assert tuple(made) == NAMES
    for stage in made.values():
        own = stage.arguments[: [*stage.arguments, "--"].index("--")]
        unknown = importlib.import_module(stage.module).parser().parse_known_args(own)[1]
        assert stage.name == "train" or not unknown, stage.name


def test_a_stage_says_all_that_it_reads(plan):
    """Every path in its words is read or made; an earlier stage made what lies in the folder."""
    made = []
    for stage in stages(plan):
        words_ = [word.rpartition("=")[2] for word in shlex.split(stage.words)]
        paths = {word for word in words_ if "/" in word} - {stage.makes, plan.questions}
        assert paths <= {*stage.reads}, stage.name
        for path in stage.reads:
            inside = Path(path).is_relative_to(plan.out)
            assert not inside or any(Path(path).is_relative_to(folder) for folder in made), path
        made.append(stage.makes)


def test_more_gpus_ask_for_the_same_answers_and_the_same_step(plan):
    four, two = by_name(plan), by_name(dataclasses.replace(plan, gpus=2, processes=2))
    for name in ("distil", "evaluate", "lossless"):
        assert four[name].how != two[name].how and four[name].words == two[name].words
    for made, count, accumulation in ((four, "4", "2"), (two, "2", "4")):
        train = made["train"]
        assert train.environment == {"NPROC_PER_NODE": count}
        assert train.arguments[train.arguments.index("--gradient_accumulation_steps") + 1] == accumulation
    assert "NPROC_PER_NODE=4 python -m fastmtp.train" in four["train"].command


def test_each_engine_gets_the_flags_that_it_can_take(plan):
    flags = [
        "--attention-backend",
        "fa3",
        "--speculative-draft-attention-backend",
        "triton",
        "--sleep-on-idle",
    ]
    made = by_name(dataclasses.replace(plan, flags=flags))
    assert made["evaluate"].command.endswith("-- " + shlex.join(flags))
    assert made["distil"].command.endswith("-- --attention-backend fa3 --sleep-on-idle")  # it drafts nothing
    assert made["lossless"].command.endswith("-- " + shlex.join(flags[2:]))  # in float32 fa3 cannot compute


def prepared(plan: Plan, rows: int, **config) -> None:
    base = plan.out / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps({"vocab_size": rows}))
    (base / "run.json").write_text(json.dumps({"command": "x", "config": config}))


def test_a_model_with_a_head_of_its_own_needs_no_start(plan):
    prepared(plan, 151936, model="mimo")  # as prepare_model records a released MiMo
    made = by_name(plan)
    assert not {"fit", "start"} & {*made}
    assert [stage.name for stage in stages_until(plan, "fit")] == ["prepare", "distil", "curate"]
    base = str(plan.out / "base")
    train, evaluate = made["train"].arguments, made["evaluate"].arguments
    assert train[train.index("--model") + 1] == base == evaluate[evaluate.index("--vanilla-model") + 1]


@pytest.mark.parametrize("rows, sizes", [(151936, [32768, 16384]), (49152, [16384]), (320, [288])])
def test_maps_are_at_most_half_of_the_vocabulary(plan, rows, sizes):
    prepared(plan, rows, head=None)
    assert map_sizes(plan) == sizes


def test_ready_maps_are_those_of_the_models_tokenizer(plan):
    prepared(plan, 151936, head=None)
    (plan.out / "maps").mkdir()
    ready = json.loads(resource("vocab/qwen2/union_32k.json").read_text())
    own = plan.out / "maps" / "union_32k.json"
    own.write_text(json.dumps(ready))
    assert [*all_maps(plan)] == ["own", "u16k", "u32k"]
    arms = by_name(plan)["evaluate"].arguments
    arms = arms[arms.index("--arms") + 1].split(",")
    assert arms[:2] == ["baseline", "vanilla:3"] and {"fastmtp:5", "fastmtp:3+u16k", "fastmtp:3+own"} <= {
        *arms
    }
    ready["tokenizer"]["sha256_of_vocabulary"] = "other"
    own.write_text(json.dumps(ready))
    assert [*all_maps(plan)] == ["own"]


def test_another_model_is_another_fingerprint(plan, tmp_path):
    first = next(stages(plan))
    before = facts_of(first, {})
    (tmp_path / "model" / "config.json").write_text("{}")
    assert facts_of(first, {}) != before


def test_words_are_what_a_shell_reads():
    text = words("a b", max_len=3, none=None, empty=[], files=["x", "y z"])
    assert shlex.split(text) == ["a b", "--max-len", "3", "--files", "x", "y z"]
