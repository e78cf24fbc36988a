"""The figures in the checkout are those that their scripts draw, of the results in the checkout."""

import sys
from pathlib import Path

import pytest

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FIGURES))
    for name in ("drawing", "diagrams", "speed"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_diagrams(scripts, tmp_path):
    import diagrams

    drawings = (diagrams.pipeline, diagrams.cycle, diagrams.recursion, diagrams.tree)
    for draw in drawings:
        draw().save(tmp_path / "new.svg")
        assert (tmp_path / "new.svg").read_text() == (FIGURES / f"{draw.__name__}.svg").read_text(), (
            draw.__name__
        )
    names = {path.stem for path in FIGURES.glob("*.svg")}
    assert names == {draw.__name__ for draw in drawings} | {"speed"}


def test_the_mask_of_the_tree_is_of_ancestors(scripts):
    import diagrams

    assert diagrams.ancestors("f") == {"f", "c", "a"} and diagrams.ancestors("b") == {"b"}


def test_speed_is_of_the_table(scripts):
    import speed

    columns = speed.table(speed.RESULTS.read_text(encoding="utf-8"))
    assert {len(column) for column in columns.values()} == {7} and columns["full, 152k"][0] == 1.56
    drawn = (FIGURES / "speed.svg").read_text(encoding="utf-8")
    assert all(f"{columns['32k'][k - 1]:.2f}x" in drawn for k in (3, 4))
