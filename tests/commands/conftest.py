from pathlib import Path

import pytest
from helpers.distilling import ask


@pytest.fixture
def place(tmp_path, base_folder, monkeypatch) -> Path:
    """A folder of its own with a model and thirty prompts to distil; the working folder meanwhile."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(base_folder, target_is_directory=True)
    ask(*(f"what is {n} plus {n}?" for n in range(30)))
    return tmp_path
