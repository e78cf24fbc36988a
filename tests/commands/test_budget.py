"""`fastmtp doctor --budget`: arithmetic by hand, the calibration, and a document that says what it prints."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fastmtp.budget import estimate, measured
from fastmtp.budget.cards import CARDS, DECODER, SGLANG
from fastmtp.budget.shapes import SHAPES, backbone_bytes, draft_bytes, model_bytes, shape_of
from fastmtp.cli import InputError
from fastmtp.doctor import main

DOCUMENT = Path(__file__).parents[2] / "docs" / "your_model.md"
SMALL = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 100,
}


def printed(capsys, *words: str) -> str:
    main(["--budget", *words])
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def test_a_folder_a_config_and_a_name_are_shapes(folder):
    shape = shape_of(str(folder))
    assert shape == shape_of(str(folder / "config.json"))
    assert shape["head_dim"] == 4 and shape["num_key_value_heads"] == 2
    layer = 4 * 8 * 8 + 3 * 8 + 3 * 8 * 16 + 2 * 8  # attention, its biases, MLP, norms
    assert backbone_bytes(shape) == 2 * (2 * layer + 8 + 100 * 8)
    assert model_bytes(shape) == backbone_bytes(shape) + 2 * 100 * 8  # not tied: the embedding too
    assert draft_bytes(shape, 10) == 2 * (layer + 2 * 8 * 8 + 3 * 8 + 10 * 8)
    assert shape_of("7b") is SHAPES["mimo-7b"] and shape_of("QWEN2.5-1.5b") is shape_of("1.5B")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_experts": 64}, "mixture of experts"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": None}, "vocab_size must be a whole number"),
        ({"hidden_size": 0}, "hidden_size must be a whole number"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(folder, change, words):
    (folder / "config.json").write_text(json.dumps(SMALL | change))
    with pytest.raises(InputError, match=words):
        shape_of(str(folder))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--budget", "7B"], "needs --gpu"),
        (["--budget", "7B", "--gpu", "h300"], "unknown card; choose one of b200, h200"),
        (["--budget", "70B", "--gpu", "h200"], "none of 0.5B, 1.5B, 7B, 30B"),
        (["models/x", "--budget", "7B", "--gpu", "h200"], "leave FOLDER"),
        (["--budget", "7B", "--gpu", "h200", "--tau", "0.5"], "--tau"),
        ([], "give a model folder"),
        (["models/x", "--gpu", "h200"], "--budget MODEL --gpu CARD"),
    ],
)
def test_wrong_use_is_refused_in_one_line(words, message):
    with pytest.raises(InputError, match=message) as error:
        main(words)
    assert "\n" not in str(error.value)


def test_times_by_hand():
    shape, card = SHAPES["mimo-7b"], CARDS["h200"]
    plain = backbone_bytes(shape) / (SGLANG.share * 4.8e12) + 36 * SGLANG.layer
    draft = draft_bytes(shape, 32768) / (SGLANG.share * 4.8e12) + SGLANG.layer + SGLANG.draft
    assert estimate.plain_time(shape, card) == pytest.approx(plain)
    assert estimate.cycle_time(shape, card, 3, 32768) == pytest.approx(plain + 3 * draft + SGLANG.cycle)
    bound = (backbone_bytes(shape) + 3 * draft_bytes(shape, 32768)) / 4.8e12
    assert estimate.cycle_time(shape, card, 3, 32768, overheads=False) == pytest.approx(bound)
    assert estimate.cycle_time(SHAPES["smollm2"], card, 1, 8192) == SGLANG.shortest


@pytest.mark.parametrize("engine, columns", [(SGLANG, 4), (DECODER, 2)])
def test_the_overheads_are_the_best_fit_of_what_was_measured(engine, columns):
    """Least squares of relative errors over bytes, layers, draft steps and cycles."""
    rows, known = [], []
    for row in measured.DECODING:
        shape, card = SHAPES[row.shape], CARDS[row.card]
        if not row.fitted or card.engine is not engine:
            continue
        read = backbone_bytes(shape) + row.num_steps * draft_bytes(shape, row.rows or shape["vocab_size"])
        layers = shape["num_hidden_layers"] + row.num_steps
        parts = (read / card.bandwidth, layers, row.num_steps, row.num_steps > 0)
        rows.append([part / row.ms * 1000 for part in parts[:columns]])
        known = (1 / engine.share, engine.layer, engine.draft, engine.cycle)[:columns]
    best = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    assert known == pytest.approx(best, rel=0.02)


def test_training_operations_are_those_of_the_benchmark():
    """There each document is counted, attention's pairs too; here a token on average."""
    train_throughput = pytest.importorskip("benchmarks.train_throughput")
    shape = SHAPES["mimo-7b"]
    documents = train_throughput.make_documents(40, 1000, 0)
    tokens = sum(len(ids) for ids, _ in documents)
    counted = train_throughput.useful_operations(shape, documents, 3) / tokens
    assert estimate.training_operations(shape, 3) == pytest.approx(counted, rel=0.05)


def test_what_does_not_fit_has_no_times(capsys):
    result = json.loads(printed(capsys, "7B", "30B", "--gpu", "a10", "--json", "--tau", "2"))
    small, large = result["models"]
    assert small["fits"] and small["train"]["tokens_per_second"] is None  # 31 GB for training
    assert small["cycles"][0]["speedups"]["2.0"] == pytest.approx(2 / small["cycles"][0]["pays_from_tau"])
    assert not large["fits"] and large["plain_ms"]["expected"] is None and large["distil"]["hours"] is None
    assert any("2.03x" in line for line in result["basis"])
    assert "| fits, to serve | yes | no |" in printed(capsys, "7B", "30B", "--gpu", "A10")


def test_the_document_shows_what_the_command_prints(capsys):
    text = DOCUMENT.read_text(encoding="utf-8")
    commands = re.findall(r"^fastmtp doctor --budget (.+)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        table, _, basis = printed(capsys, *command.split()).strip().partition("\n\n")
        assert table in text, f"docs/your_model.md: run fastmtp doctor --budget {command} again"
        assert all(line in " ".join(text.split()) for line in basis.splitlines())


def test_the_document_shows_the_errors():
    """Its table of what was measured, row by row: of cycles on GPUs those with K = 3, whole and with 32k."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for row, value, error in estimate.errors():
        rate = isinstance(row, measured.Rate)
        if rate or row.card == "cpu" or row.num_steps in (0, 3) and row.rows in (None, 32768):
            number = row.tokens if rate else row.ms
            cells = f"| {number:,.4g} | {value:,.4g} | {error:+.1%} |"
            cells = f"| {number:,.0f} | {value:,.0f} | {error:+.1%} |" if number >= 100 else cells
            assert cells in text, f"docs/your_model.md lacks {row}: {cells}"
