"""The reference says what the code does: recipe keys, file formats, exit codes."""

import json
import re
from pathlib import Path

import pytest
import yaml

from evaluation.metrics import result_line
from fastmtp import decoding, files
from fastmtp.checkpoint import HEAD_TENSORS, PREFIX
from fastmtp.data.journal import sample
from fastmtp.data.prompts import Chat
from fastmtp.data.recipe import FIXED, HEAD_KEYS, REFUSED
from fastmtp.head.modeling_mimo import SETTINGS, MiMoConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def section(page: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading of docs/PAGE, the header left out."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in re.findall(r"^\|.*$", part, re.M)
    ]
    return rows[2:]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def listed(page: str, heading: str) -> set[str]:
    """What the first column of that table names."""
    return {name for row in section(page, heading) for name in names(row[0])}


def test_every_key_of_the_head_with_its_default():
    rows = {name: row for row in section("recipe.md", "What the head learns") for name in names(row[0])}
    assert rows.keys() == {*HEAD_KEYS}
    defaults = MiMoConfig()
    assert [name for name in SETTINGS if rows[name][1].strip("`") != str(getattr(defaults, name))] == []


def test_what_any_head_needs():
    rows = section("recipe.md", "What any head needs")
    assert {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows} == FIXED


def test_what_is_not_supported():
    rows = section("recipe.md", "What is not supported")
    said = {row[0].strip("`"): (yaml.safe_load(row[1].strip("`")), row[2]) for row in rows}
    assert said == REFUSED


def test_a_distilled_sample():
    chat = Chat("key", "id", "source", "en", [[]], None)
    messages = [{"role": "assistant", "content": "a", "token_ids": [1]}]
    assert listed("formats.md", "Distilled sample") == {*sample(chat, messages, [2], {1}), "retokenised"}


def test_a_token_map():
    about = json.loads((REPOSITORY / "vocab" / "smollm2" / "en_8k.json").read_text(encoding="utf-8"))
    assert listed("formats.md", "Token map") == about.keys()


def test_a_head_checkpoint():
    assert {PREFIX + "0." + name for name in listed("formats.md", "Head checkpoint")} == HEAD_TENSORS


def test_an_evaluation_result():
    about = dict(task="", arm="", model="", num_steps=1, token_map=None, temperature=0.0)
    line = result_line([], **about, config={}, environment={})
    assert listed("formats.md", "Evaluation result") == line.keys()


def test_a_decoded_prompt(useful, tmp_path):
    useful.model.tokenizer = useful.model.tokenizer or Words()
    rows = decoding.compare(
        useful.model, [{"id": "a", "prompt_ids": useful.prompts[0]}], 4, 1, None, tmp_path / "out.jsonl", {}
    )
    assert listed("formats.md", "Decoded prompt") == rows[0].keys()


class Words:
    """A tokenizer that only writes."""

    def decode(self, ids: list[int], **_) -> str:
        return str(ids)


def test_the_record_of_an_output(tmp_path):
    (tmp_path / "others.txt").write_text("here before")
    files.claim(tmp_path, folder=True)
    files.write_provenance(tmp_path, {}, [], {})
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert listed("formats.md", "Record of an output") == record.keys()


@pytest.mark.parametrize("code", ["0", "1", "2"])
def test_exit_codes_have_one_table(code):
    assert code in [row[0] for row in section("trust.md", "Exit codes")]
