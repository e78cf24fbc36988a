"""A folder that passes for a model, questions, and SGLang replaced by a stand-in."""

import json
import sys
from pathlib import Path

import pytest
from helpers.tiny import chatml_tokenizer

from fastmtp.engines import sglang

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
def short_tasks(tmp_path):
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
