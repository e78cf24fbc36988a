"""The report holds the figures of the files it was given, and says which file is wrong."""

import json

import pytest

from fastmtp.cli import InputError
from fastmtp.report import head_name, read_acceptance, read_losses, report


def write_log(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "logging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def step(number, **losses):
    return {"loss": 1.0, "learning_rate": 1e-3, "global_step/max_steps": f"{number}/20", **losses}


def acceptance_row(head, source, tokens, histogram):
    return {"head": head, "source": source, "map": "full", "output_tokens": tokens, "histogram": histogram}


def test_loss_curves_of_each_step_without_the_closing_summary(tmp_path):
    summary = {"train_loss": 2.0, "mtp_loss_1": 9.0, "global_step/max_steps": "20/20"}
    run = write_log(
        tmp_path / "run", step(5, mtp_loss_1=3.0, mtp_loss_2=4.0), step(10, mtp_loss_1=2.5), summary
    )
    assert read_losses(run) == {"mtp_loss_1": [(5, 3.0), (10, 2.5)], "mtp_loss_2": [(5, 4.0)]}


def test_a_log_of_another_kind_of_training_is_refused(tmp_path):
    with pytest.raises(InputError, match="mtp_loss"):
        read_losses(write_log(tmp_path / "run", {"loss": 1.0}))


def test_acceptance_is_pooled_over_sources(tmp_path):
    path = tmp_path / "acceptance.json"
    rows = [acceptance_row("a", "x", 30, [5, 5, 0]), acceptance_row("a", "y", 10, [0, 0, 5])]
    path.write_text(json.dumps({"num_steps": 2, "rows": rows}), encoding="utf-8")
    ((key, part),) = read_acceptance(path).items()
    assert key == ("a", "full")
    assert part.accept_length == pytest.approx(40 / 15)
    assert part.position_rates == pytest.approx([10 / 15, 5 / 15])


def test_the_page_and_its_pictures(tmp_path):
    run = write_log(tmp_path / "run", step(5, mtp_loss_1=3.0), step(10, mtp_loss_1=2.5))
    figures = tmp_path / "acceptance.json"
    figures.write_text(
        json.dumps({"rows": [acceptance_row("runs/q/last-checkpoint", "x", 30, [5, 5, 5])]}), encoding="utf-8"
    )
    answer = {
        "output_ids": [1, 2, 3],
        "verify_passes": 2,
        "histogram": [1, 1],
        "plain_s": 3.0,
        "draft_s": 2.0,
    }
    decoded = tmp_path / "float32.jsonl"
    decoded.write_text(
        "".join(json.dumps({**answer, "identical": flag}) + "\n" for flag in (True, False)), encoding="utf-8"
    )
    report(str(run), str(figures), [str(decoded)], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| float32 | 2 | 6 | 1.500 | 1.0 | 1.5 | 1.50 | 1 of 2 |" in page
    assert "| q | full | 2.000 | 66.7 % | 33.3 % |" in page
    for name in ("losses.png", "acceptance.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_heads_are_called_by_their_run():
    assert head_name("runs/quickstart/checkpoint-40") == "quickstart"
    assert head_name("smollm2-vanilla") == "smollm2-vanilla"
