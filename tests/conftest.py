from pathlib import Path

import pytest
import torch
from tiny import chatml_tokenizer, save_folder

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A tiny model in MiMo layout, one weight file. Do not write into it."""
    return save_folder(tmp_path_factory.mktemp("base") / "model")
