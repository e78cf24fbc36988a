"""The card of an exported folder, and bringing the folder to a hub."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import hubs
from helpers.tiny import save_folder
from huggingface_hub import ModelCard

from fastmtp import export as command
from fastmtp import files, hub
from fastmtp.checkpoint import read_head, save_head
from fastmtp.cli import InputError
from fastmtp.prepare_model import prepare
from fastmtp.show import card


@pytest.fixture
def base(tmp_path) -> Path:
    """A model folder that came from a hub, as its record says."""
    folder = save_folder(tmp_path / "base")
    origin = {"model": "org/base", "hub": "hf", "repo": "org/base", "revision": "abc"}
    files.write_provenance(folder, origin)
    return folder


@pytest.fixture
def checkpoint(tmp_path, base) -> Path:
    """A checkpoint of a run that measured tau."""
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoint-7"
    folder.mkdir(parents=True)
    save_head(folder, read_head(base))
    rows = [
        {"step": 3, "eval_tau": 1.5},
        {"step": 7, "eval_tau": 2.25, "eval_rate_1": 0.8, "eval_rate_2": 0.5},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": rows}))
    recipe = {
        "dataset": ["/home/me/train.jsonl"],
        "model_kwargs": {"mtp_num_steps": 2},
        "learning_rate": 1e-3,
    }
    files.write_provenance(run, recipe)
    (run / "best-checkpoint").symlink_to("checkpoint-7")
    return run / "best-checkpoint"


def test_a_card_says_what_is_recorded(base, checkpoint, tmp_path):
    command.main(["--base", str(base), "--head", str(checkpoint), "--out", str(tmp_path / "my-model")])
    text = (tmp_path / "my-model" / "README.md").read_text()
    front = ModelCard(text).data.to_dict()
    assert front["base_model"] == "org/base" and front["pipeline_tag"] == "text-generation"
    assert front["library_name"] == "transformers" and "speculative-decoding" in front["tags"]
    assert "# my-model" in text and "--model my-model --num-steps 2" in text
    assert "| base | org/base |" in text and "| base's revision | abc |" in text
    assert "| trained on | train.jsonl |" in text and "`learning_rate: 0.001`" in text
    assert "2.250 tokens per verify pass on held-out answers, K=2" in text and "| 0.800 0.500 |" in text
    assert "after its final norm" in text and "/home/me" not in text and str(tmp_path) not in text


def test_what_is_unknown_is_left_out(base_folder, tmp_path):
    command.export(base_folder, base_folder, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert "None" not in text and "tau" not in text and "Nothing is recorded of its training" in text


def test_an_edited_card_is_kept_and_an_untouched_one_is_not(base, checkpoint, base_folder, tmp_path):
    out = tmp_path / "out"
    command.export(base_folder, base_folder, out)
    command.export(base, checkpoint, out)
    assert "org/base" in (out / "README.md").read_text()
    (out / "README.md").write_text((out / "README.md").read_text().replace("# out", "# Mine"))
    command.export(base_folder, base_folder, out)
    assert "# Mine" in (out / "README.md").read_text() and "org/base" in (out / "README.md").read_text()


def test_a_bases_own_card_is_not_the_exports(base, tmp_path):
    (base / "README.md").write_text("# The base\n")
    command.export(base, base, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# The base" not in text and card.untouched(text) and not card.untouched("# The base\n")


def test_a_prepared_folder_knows_the_name_it_came_from(stand_in, base_folder, tmp_path):
    stand_in.repos["org/base"] = {p.name: p.read_bytes() for p in base_folder.iterdir() if p.is_file()}
    prepare("org/base", tmp_path / "base")
    record = json.loads((tmp_path / "base" / "run.json").read_text())["config"]
    assert record == {
        "model": "org/base", "hub": "hf", "repo": "org/base", "revision": stand_in.commit("org/base")
    }  # fmt: skip


@pytest.fixture(params=["hf", "modelscope"])
def account(request, stand_in, tmp_path, monkeypatch):
    """The stand-in with a user who is logged in to one of the hubs."""
    monkeypatch.setenv("FASTMTP_HUB", request.param)
    name = "HF_TOKEN" if request.param == "hf" else "MODELSCOPE_API_TOKEN"
    monkeypatch.setenv(name, hubs.TOKEN)
    return stand_in


def arguments(base: Path, out: Path, repo: str = "me/new") -> list[str]:
    return ["--base", str(base), "--head", str(base), "--out", str(out), "--push", repo]


def test_a_new_repository_is_private_and_holds_the_folder(account, base, tmp_path, capsys):
    command.main(arguments(base, tmp_path / "out"))
    there = account.repos["me/new"]
    local = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.name != "run.json"}
    assert {name: there.get(name) for name in local} == local and "run.json" not in there
    asked = account.created["me/new"]
    assert (
        asked.get("visibility") == "private" or asked.get("private") is True or asked.get("Visibility") == 1
    )
    assert "--model me/new" in there["README.md"].decode()
    assert capsys.readouterr().out.splitlines()[-1].endswith("/me/new")
    assert hub.model("me/new").is_dir(), "it can be used by its name"


def test_a_second_push_keeps_what_was_edited_there(account, base, tmp_path):
    command.main(arguments(base, tmp_path / "out"))
    account.repos["me/new"] |= {"README.md": b"# Mine\n", "notes.txt": b"mine", "config.json": b"{}"}
    command.main(arguments(base, tmp_path / "out"))
    there = account.repos["me/new"]
    assert there["README.md"] == b"# Mine\n" and there["notes.txt"] == b"mine"
    assert there["config.json"] == (tmp_path / "out" / "config.json").read_bytes()


@pytest.mark.parametrize(
    "repo, extra, message",
    [
        ("new", [], "--push new: expected ORG/NAME"),
        ("me/full", [], r"holds other files \(model.bin\); give a new name"),
        ("me/new", ["--for", "vllm-stock"], "omit one of them"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_export(account, repo, extra, message, base, tmp_path):
    account.repos["me/full"] = {".gitattributes": b"", "model.bin": b"x"}
    with pytest.raises(InputError, match=message):
        command.main([*arguments(base, tmp_path / "out", repo), *extra])
    assert not (tmp_path / "out").exists() and account.repos["me/full"]["model.bin"] == b"x"


@pytest.mark.parametrize("which, variable", [("hf", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")])
def test_without_a_good_token_nothing_begins(which, variable, stand_in, base, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMTP_HUB", which)
    with pytest.raises(InputError, match=f"--push me/new: no token for .*; run .* login, or set {variable}"):
        command.main(arguments(base, tmp_path / "out"))
    monkeypatch.setenv(variable, "wrong")
    with pytest.raises(InputError, match="--push me/new: .* refuses"):
        command.main(arguments(base, tmp_path / "out"))
    assert not (tmp_path / "out").exists() and stand_in.repos == {}
