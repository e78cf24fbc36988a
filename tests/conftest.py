from pathlib import Path

import pytest
import torch
from tiny import Useful, chatml_tokenizer, save_folder, useful_model

torch.set_num_threads(1)  # tensors of a few hundred numbers: a second thread makes them thirty times slower


@pytest.fixture(scope="session")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A tiny model in MiMo layout, one weight file. Do not write into it."""
    return save_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def useful() -> Useful:
    return useful_model()
