import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hub; without a network it tries for a minute

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import hubs  # noqa: E402
from helpers.small_vocab import small_tokenizer  # noqa: E402
from helpers.tiny import Useful, chatml_tokenizer, save_folder, useful_model  # noqa: E402

torch.set_num_threads(1)  # tensors of a few hundred numbers: a second thread makes them thirty times slower


def pytest_addoption(parser):
    text = "how often each command is killed, and how often its disk is full (default 2)"
    parser.addoption("--kills", type=int, default=2, metavar="N", help=text)


@pytest.fixture(scope="session")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A tiny model in MiMo layout, one weight file. Do not write into it."""
    return save_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def vocab_folder(tmp_path_factory) -> str:
    """A folder with the small tokenizer of the vocabulary builder. Do not write into it."""
    return small_tokenizer(tmp_path_factory.mktemp("vocab"))


@pytest.fixture(scope="session")
def useful() -> Useful:
    return useful_model()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Both hubs on this machine, with empty caches and no token."""
    with hubs.serving() as (hub, url):
        hubs.point_to(url, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def questions(tmp_path):
    """A folder of five two-turn questions of MT-Bench."""
    folder = tmp_path / "questions"
    folder.mkdir()
    turns = [[f"what is w{n}", "what is red"] for n in range(6, 11)]
    (folder / "mt_bench.jsonl").write_text("".join(json.dumps({"turns": t}) + "\n" for t in turns))
    return folder


@pytest.fixture
def hurry(monkeypatch):
    """Distillation does not wait before it asks a server again."""
    monkeypatch.setattr("fastmtp.data.servers.PULSE", 0.0)
    monkeypatch.setattr("fastmtp.data.servers.BACKOFF", 0.01)
