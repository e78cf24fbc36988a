"""What the quickstart's stages say fits together."""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
from transformers.utils import logging

from fastmtp import fingerprint, quickstart
from fastmtp.data.prompts import read_prompts
from fastmtp.fingerprint import differences
from fastmtp.inputs import resource
from fastmtp.pipeline.stages import Stage
from fastmtp.quickstart import SHIPPED, SMOKE, Sizes, facts_of, stages


def test_a_head_or_the_code_that_changes_is_seen(monkeypatch, tmp_path):
    decode = Stage("decode", "fastmtp.decoding", f"--head {SHIPPED}", "out.jsonl", (SHIPPED,))
    before = facts_of(decode)
    shutil.copytree(quickstart.HEADS / SHIPPED, tmp_path / SHIPPED)
    monkeypatch.setattr(quickstart, "HEADS", tmp_path)
    assert facts_of(decode) == before  # a copy is the same head
    with open(tmp_path / SHIPPED / "model.safetensors", "r+b") as weights:
        weights.seek(-2, 2)
        weights.write(b"xx")
    assert differences(before, facts_of(decode)) == [f"{SHIPPED}: other content"]
    package = tmp_path / "package"
    (package / "head").mkdir(parents=True)
    (package / "head" / "x.py").write_text("a = 1")
    monkeypatch.setattr(fingerprint, "__file__", str(package / "fingerprint.py"))
    first = fingerprint.code.__wrapped__()
    (package / "head" / "x.py").write_text("a = 2")
    assert fingerprint.code.__wrapped__() != first


@pytest.mark.parametrize("sizes", [Sizes(), SMOKE])
def test_every_stage_is_a_command_whose_arguments_parse(sizes):
    for stage in stages(sizes):
        parser = importlib.import_module(stage.module).parser()
        unknown = parser.parse_known_args(stage.arguments)[1]
        assert stage.module == "fastmtp.train" or not unknown, stage.name


@pytest.mark.parametrize("sizes", [Sizes(), SMOKE])
def test_a_stage_says_all_that_it_reads(sizes):
    """Every path and head in its words is read, made or its own output folder; earlier stages made it."""
    made = []
    for stage in stages(sizes):
        paths = {word for word in stage.arguments if "/" in word or word == SHIPPED}
        own = {path for path in paths if path == stage.makes or Path(stage.makes).parent == Path(path)}
        assert paths - own <= {*stage.reads}, stage.name
        for path in stage.reads:
            shipped = resource(path).exists() or path == SHIPPED
            assert shipped or any(Path(path).is_relative_to(folder) for folder in made), path
        made.append(stage.makes)


def test_smoke_and_full_run_share_nothing_but_the_base_model():
    made = [{s.makes for s in stages(sizes)} for sizes in (Sizes(), SMOKE)]
    assert made[0] & made[1] == {"models/smollm2"}


def test_trained_and_shipped_head_decode_the_same_prompts():
    """In bfloat16 with the same words but for the head and the file, and everything reaches the report."""
    made = {s.name: s for s in stages(Sizes())}
    own, shipped = made["decode bfloat16"], made["decode shipped-bfloat16"]
    rest = [word for word in shipped.arguments if word not in ("--head", SHIPPED, shipped.makes)]
    assert rest == [word for word in own.arguments if word != own.makes]
    assert SHIPPED in shipped.arguments
    assert {own.makes, shipped.makes, made["decode float32"].makes} <= set(made["report"].arguments)


@pytest.mark.parametrize("sizes", [Sizes(), SMOKE])
def test_training_starts_from_the_solved_head_and_the_page_compares_four(sizes):
    """The head as prepared, as solved, as trained and as it comes with the package, in this order."""
    made = {s.name: s for s in stages(sizes)}
    words = made["train"].arguments
    assert words[words.index("--model") + 1] == made["start"].makes
    assert made["fit"].makes in made["start"].arguments and made["fit"].arguments[1] == quickstart.BASE
    words = made["acceptance"].arguments
    heads = [words[i + 1] for i, word in enumerate(words) if word == "--head"]
    trained = f"{made['train'].makes}/last-checkpoint"
    assert heads == [quickstart.BASE, made["fit"].makes, trained, SHIPPED]


def decoded(turn: int, accepted: list[int], identical: bool) -> dict:
    """A row of `decoding` for a held-out prompt."""
    prompt = read_prompts(resource(quickstart.PROMPTS), "heldout")[turn]
    ids = [5] * (1 + sum(accepted) + len(accepted))
    row = {"id": prompt["id"], "plain_ids": ids, "output_ids": ids, "identical": identical}
    row |= {"histogram": [accepted.count(j) for j in range(4)], "plain_s": 2.0, "draft_s": 1.0}
    return row | {"verify_passes": len(accepted), "accepted": accepted}


@pytest.fixture
def results(tmp_path, monkeypatch, base_folder):
    """What the stages before the last screen wrote, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "BASE", str(base_folder))
    out = tmp_path / "results" / SMOKE.name
    out.mkdir(parents=True)
    for name in quickstart.DECODED:
        rows = [decoded(0, [3, 3], False), decoded(1, [0, 0], True)]
        rows += [decoded(2, [1, 0], True), decoded(3, [3, 0], True)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"head": SHIPPED, "output_tokens": 30, "histogram": [10, 5]}
    rows = [row | {"map": "full"}, row | {"map": "en_8k", "output_tokens": 24}]
    (out / "acceptance.json").write_text(json.dumps({"rows": rows}))
    return out


def test_the_shipped_heads_tau_is_acceptances_with_the_map(results):
    summary = quickstart.summarise_run(SMOKE, {}, None)
    assert summary["shipped"]["tau"] == 1.6 and summary["shipped"]["bfloat16"]["identical"] == 3
    assert not summary["lossless"] and summary["speedup"] == 2.0


def test_the_last_screen_shows_the_median_of_the_answers_that_came_out_the_same(results):
    screen = quickstart.last_screen(SMOKE).split("\n")
    question = read_prompts(resource(quickstart.PROMPTS), "heldout")[2]["messages"][-1]["content"]
    assert screen[1].startswith(f"> {question[:40]}") and len(screen) < 16
    assert "with drafts: 2 passes, 4.0 tokens/s" in screen and "plain: 3 passes, 2.0 tokens/s" in screen
    assert any("both texts are the same" in line for line in screen)
    assert "docs/tutorial.md" in "".join(screen) and "\x1b" not in "".join(screen)


def test_what_the_libraries_say_is_the_users_choice(monkeypatch):
    before = logging.get_verbosity()
    monkeypatch.delenv("LOG_LEVEL", raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    try:
        quickstart.quieten()
        assert os.environ["LOG_LEVEL"] == "ERROR" and logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
        os.environ.pop("LOG_LEVEL", None)
