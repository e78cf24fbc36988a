"""What the quickstart's stages say fits together."""

import importlib
import shutil
from pathlib import Path

import pytest

from fastmtp import fingerprint, quickstart
from fastmtp.fingerprint import differences
from fastmtp.inputs import resource
from fastmtp.quickstart import SMOKE, VANILLA, Sizes, facts_of, stages


def test_a_head_or_the_code_that_changes_is_seen(monkeypatch, tmp_path):
    prepare = stages(SMOKE)[0]
    before = facts_of(prepare)
    shutil.copytree(quickstart.HEADS / VANILLA, tmp_path / VANILLA)
    monkeypatch.setattr(quickstart, "HEADS", tmp_path)
    assert facts_of(prepare) == before  # a copy is the same head
    with open(tmp_path / VANILLA / "model.safetensors", "r+b") as weights:
        weights.seek(-2, 2)
        weights.write(b"xx")
    assert differences(before, facts_of(prepare)) == [f"{VANILLA}: other content"]
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
        paths = {word for word in stage.arguments if "/" in word or word in (VANILLA, quickstart.SHIPPED)}
        own = {path for path in paths if path == stage.makes or Path(stage.makes).parent == Path(path)}
        assert paths - own <= {*stage.reads}, stage.name
        for path in stage.reads:
            shipped = resource(path).exists() or path in (VANILLA, quickstart.SHIPPED)
            assert shipped or any(Path(path).is_relative_to(folder) for folder in made), path
        made.append(stage.makes)


def test_smoke_and_full_run_share_nothing_but_the_base_model():
    made = [{s.makes for s in stages(sizes)} for sizes in (Sizes(), SMOKE)]
    assert made[0] & made[1] == {"models/smollm2"}


def test_trained_and_shipped_head_decode_the_same_prompts():
    """In both precisions with the same words but for the head and the file, and all four reach the report."""
    made = {s.name: s for s in stages(Sizes())}
    for dtype in ("float32", "bfloat16"):
        own, shipped = made[f"decode {dtype}"], made[f"decode shipped-{dtype}"]
        rest = [
            word for word in shipped.arguments if word not in ("--head", quickstart.SHIPPED, shipped.makes)
        ]
        assert (
            rest == [word for word in own.arguments if word != own.makes]
            and quickstart.SHIPPED in shipped.arguments
        )
        assert {own.makes, shipped.makes} <= set(made["report"].arguments)
