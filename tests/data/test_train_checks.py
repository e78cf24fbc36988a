"""The command up to ms-swift, which a stand-in replaces: what would train nothing is refused, in one line."""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny import save_folder

from fastmtp import files, train
from fastmtp.checkpoint import read_head, save_head
from fastmtp.cli import InputError
from fastmtp.data import recipe_check
from fastmtp.data.training_run import RECORD

KEYS = {
    *("model", "dataset", "output_dir", "model_kwargs", "val_dataset", "max_length", "learning_rate"),
    *("max_steps", "num_train_epochs", "warmup_steps", "warmup_ratio", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "dataset_num_proc", "seed", "data_seed", "columns", "packing_length"),
}
ROW = {"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "two is two"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def command(model, tmp_path, monkeypatch):
    """(Run the command with changes to the recipe, what ms-swift was to read).

    The stand-in moves the head as far as `learning_rate`.
    """
    seen = []

    def swift(recipe, sets, start, *others):
        seen.append({key: [ids.tolist() for ids, _ in rows.sequences()] for key, rows in sets.items()})
        checkpoint = Path(recipe["output_dir"]) / "checkpoint-1"
        checkpoint.mkdir()
        shutil.copyfile(checkpoint.parent / RECORD, checkpoint / RECORD)
        (checkpoint / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 2}')
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, checkpoint / name)
        head = read_head(recipe["model"])
        save_head(checkpoint, {name: t.float() + recipe["learning_rate"] * moved for name, t in head.items()})
        return 0

    moved = torch.tensor(1.0)
    monkeypatch.setattr(train, "swift_keys", lambda: KEYS | set(train.read_recipe("configs/quickstart.yaml")))
    monkeypatch.setattr(train, "complete", lambda recipe, place: recipe)
    monkeypatch.setattr(train, "run_swift", swift)
    monkeypatch.setattr(train, "launch", lambda recipe, folder: contextlib.nullcontext())
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(ROW) + "\n")

    def call(stuck=False, **changes):
        moved.fill_(0.0 if stuck else 1.0)
        recipe = dict(model=str(model), dataset=[str(data)], output_dir=str(tmp_path / "out"))
        recipe |= dict(learning_rate=1e-3, max_length=64, max_steps=2)
        recipe |= dict(model_kwargs=dict(mtp_num_steps=2, mtp_attention="exact"))
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | changes))
        try:
            train.main([str(path)])
        finally:
            files.release(tmp_path / "out")

    return call, seen


def head_keys(**keys) -> dict:
    return {"model_kwargs": dict(mtp_num_steps=2, mtp_attention="exact") | keys}


def test_a_row_reaches_ms_swift(command):
    call, seen = command
    call()
    assert len(seen) == 1 and len(seen[0]["dataset"]) == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"warmup_steps": 2}, "warmup_steps must be below 2"),
        ({"warmup_steps": 90}, "warmup_steps must be below 2"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be below 1"),
        ({"warmup_ratio": "some"}, "warmup_ratio must be a number"),
        ({"per_device_train_batch_size": 0.5}, "must be a whole number"),
        ({"max_length": 63.5}, "must be a whole number"),
        ({"dataset_num_proc": "many"}, "dataset_num_proc must be a number"),
        ({"dataset_num_proc": 0}, "dataset_num_proc must be at least 1"),
        ({"data_seed": "x"}, "data_seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"dataset": "[]"}, "neither a file nor a data set"),
        ({"dataset": ["my rows"]}, "neither a file nor a data set"),
        ({"dataset": [5]}, "must be paths"),
        (head_keys(mtp_compile="yes"), "mtp_compile must be true or false"),
        (
            head_keys(mtp_flash_attn=True),
            r"flash-attn-4 does not load here \(Module.*pip install -e '.\[flash\]'",
        ),
        (head_keys(mtp_flash_attn=True, mtp_compile=True), "leave mtp_compile out"),
    ],
)
def test_a_recipe_that_trains_nothing_is_refused(command, changes, words):
    call, seen = command
    with pytest.raises(InputError, match=words) as error:
        call(**changes)
    assert not seen and "\n" not in str(error.value)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A stand-in for flash-attn-4 whose functions are in the given text."""

    def write(text: str) -> None:
        cute = tmp_path / "site" / "flash_attn" / "cute"
        cute.mkdir(parents=True)
        for folder in (cute.parent, cute):
            (folder / "__init__.py").touch()
        (cute / "interface.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "site")
        for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):  # as if never imported
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(sys.modules, name)

    return write


@pytest.mark.parametrize(
    "says, has, taken",
    [
        ({}, {}, True),
        ({}, {"capability": "10.0"}, False),  # nobody tried
        ({}, {"capability": "8.6"}, False),
        ({}, {"capability": ""}, False),  # no GPU
        ({}, {"interface": "import cutlass_that_nobody_has"}, False),
        ({}, {"config": {"head_dim": 80}}, False),  # not compared with the dense reference
        ({}, {"config": {"hidden_size": 576, "num_attention_heads": 9}}, True),
        ({"mtp_compile": True}, {}, False),
        ({"mtp_flash_attn": False}, {}, False),
        ({"mtp_flash_attn": True}, {"capability": "8.6"}, True),
    ],
)
def test_flash_attn_is_taken_where_it_loads_and_was_tested(says, has, taken, install, tmp_path, monkeypatch):
    install(has.get("interface", ""))
    monkeypatch.setattr(recipe_check, "compute_capability", lambda: has.get("capability", "9.0"))
    (tmp_path / "config.json").write_text(json.dumps(has.get("config", {"head_dim": 128})))
    recipe = {"model": str(tmp_path), "model_kwargs": says}
    assert recipe_check.takes_flash_attn(recipe) is taken


def test_flash_attn_that_is_taken_is_said_and_recorded(command, tmp_path, monkeypatch, capsys):
    call, _ = command
    monkeypatch.setattr(train, "takes_flash_attn", lambda recipe: True)
    call()
    assert "attention: FlashAttention 4" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["model_kwargs"]["mtp_flash_attn"] is True


def test_flash_attn_without_what_it_needs_is_refused_by_name(command, install):
    """Another package's copy of `flash_attn.cute`, whose compiler is missing."""
    call, seen = command
    install("import cutlass_that_nobody_has\n")
    with pytest.raises(
        InputError, match="No module named 'cutlass_that_nobody_has'.*leave the key out"
    ) as error:
        call(**head_keys(mtp_flash_attn=True))
    assert not seen and "\n" not in str(error.value)


def test_a_training_that_changed_nothing_is_an_error(command):
    call, seen = command
    for _ in range(2):  # the second time the training is finished, and has learnt no more
        with pytest.raises(InputError, match="not one weight changed"):
            call(stuck=True)
    assert len(seen) == 1


def test_a_model_without_a_chat_template_is_named(command, model, tmp_path):
    call, seen = command
    bare = save_folder(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="bare: the tokenizer has no chat template"):
        call(model=str(bare))
    assert not seen
