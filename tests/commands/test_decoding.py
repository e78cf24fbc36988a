"""The command that decodes prompts: what it keeps, asks again or refuses, and which head it uses."""

import json
import shutil

import pytest
import torch
from helpers.tiny import save_folder

from fastmtp import decoding, files
from fastmtp.checkpoint import read_head
from fastmtp.cli import InputError
from fastmtp.decoding import summarise


class Place:
    """A working folder with a model, prompts, two heads and maps, and the command's usual arguments."""

    def __init__(self, root, base_folder):
        self.root, self.model = root, shutil.copytree(base_folder, root / "model")
        self.prompts, self.out = root / "prompts.jsonl", root / "out.jsonl"
        self.prompts.write_text('{"id": "a", "prompt": "what?"}\n{"id": "b", "prompt": "the cat"}\n')
        for seed in (5, 6):
            save_folder(root / f"head{seed}", seed=seed)
        for name, ids in (("en", range(0, 200)), ("zh", range(100, 300))):
            torch.save(torch.tensor(list(ids)), root / f"{name}.pt")

    def run(self, capsys, *flags: str, **paths) -> tuple[str, list[dict]]:
        """(what was said of asked and kept rows, the rows)."""
        chosen = {"model": self.model, "prompts": self.prompts, "out": self.out} | paths
        words = [word for name, path in chosen.items() for word in (f"--{name}", str(path))]
        decoding.main([*words, "--max-new-tokens", "6", *flags])
        files.release(chosen["out"])
        (asked,) = (line for line in capsys.readouterr().err.splitlines() if " asked, " in line)
        rows = [json.loads(line) for line in chosen["out"].read_text().splitlines()]
        return asked.rpartition(": ")[2], rows


@pytest.fixture
def place(tmp_path, base_folder) -> Place:
    return Place(tmp_path, base_folder)


def test_the_same_content_is_kept_wherever_it_lies(place, capsys):
    flags = ["--head", str(place.root / "head5"), "--token-map", str(place.root / "en.pt")]
    asked, rows = place.run(capsys, *flags)
    assert asked == "2 asked, 0 kept" and [row["id"] for row in rows] == ["a", "b"]
    elsewhere = {
        "model": shutil.copytree(place.model, place.root / "elsewhere"),
        "prompts": shutil.copyfile(place.prompts, place.root / "other.jsonl"),
    }
    shutil.copytree(place.root / "head5", place.root / "again")
    shutil.copyfile(place.root / "en.pt", place.root / "map.pt")
    (place.model / "config.json").touch()
    moved = ["--head", str(place.root / "again"), "--token-map", str(place.root / "map.pt")]
    for now, paths in ((flags, {}), (moved, elsewhere)):
        assert place.run(capsys, *now, **paths) == ("0 asked, 2 kept", rows)


def exchange(place: Place, what: str) -> None:
    """Put other content under the same name."""
    if what == "head":
        shutil.rmtree(place.root / "head5")
        shutil.copytree(place.root / "head6", place.root / "head5")
    elif what == "own head":
        shutil.rmtree(place.model)
        save_folder(place.model, seed=9)
    elif what == "map":
        shutil.copyfile(place.root / "zh.pt", place.root / "en.pt")
    else:
        place.prompts.write_text('{"id": "a", "prompt": "who?"}\n{"id": "b", "prompt": "the cat"}\n')


@pytest.mark.parametrize("what", ["head", "own head", "map", "prompts"])
def test_other_content_under_the_same_name_is_asked_again(place, capsys, what):
    flags = ["--token-map", str(place.root / "en.pt")]
    flags += ["--head", str(place.root / "head5")] if what == "head" else []
    place.run(capsys, *flags)
    exchange(place, what)
    assert place.run(capsys, *flags)[0] == "2 asked, 0 kept"


def test_other_settings_are_asked_again(place, capsys):
    en, zh = place.root / "en.pt", place.root / "zh.pt"
    for flags in (
        ["--num-steps", "3"],
        ["--num-steps", "2"],
        ["--dtype", "bfloat16"],
        ["--max-new-tokens", "5"],
        ["--token-map", str(en)],
        ["--token-maps", f"en={en},zh={zh}"],
        ["--token-maps", f"zh={en},en={zh}"],
        ["--token-maps", f"en={en},zh={zh}", "--vocab-policy", "fixed:en"],
        ["--token-maps", f"en={en},zh={zh}", "--vocab-policy", "union"],
    ):
        assert place.run(capsys, *flags)[0] == "2 asked, 0 kept", flags
        assert place.run(capsys, *flags)[0] == "0 asked, 2 kept", flags


def test_somebody_elses_file_stays(place, capsys):
    place.out.write_text("my own notes\n")
    for out in (place.out, place.prompts):
        before = out.read_text()
        with pytest.raises(InputError, match="not written by this project|an input of this command"):
            place.run(capsys, out=out)
        assert out.read_text() == before


def answered(ids) -> dict:
    """A prompt whose earlier answer says its exact tokens."""
    turns = [("user", "what?"), ("assistant", "the cat"), ("user", "and?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["token_ids"] = ids
    return {"messages": messages}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "many words " * 600}, "has [0-9]+ tokens, the model's context leaves 506"),
        ({"prompt": None}, "prompts.jsonl:2: no prompt"),
        ({"prompt": 5}, "prompts.jsonl:2: "),
        ({"messages": [None]}, "prompts.jsonl:2: "),
        ({"messages": [{"content": "x"}]}, "prompts.jsonl:2: "),
        ({"messages": [{"role": "tool", "content": "5"}]}, "prompts.jsonl:2: "),
        ({"id": "half \ud83d", "prompt": "x"}, "prompts.jsonl:2: "),
        (answered([9999]), "'token_ids' holds 9999, which is no token id"),
        (answered(["5"]), "'token_ids' holds '5', which is no token id"),
        (answered([70, 71, 72]), "`token_ids` spell other text"),
    ],
    ids=[
        *("long", "null", "number", "null message", "no role", "tool", "surrogate"),
        *("ids beyond", "ids as texts", "ids of other text"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named_before_anything_is_loaded(
    place, capsys, row, words, monkeypatch
):
    monkeypatch.setattr(decoding, "load", lambda *_: pytest.fail("the weights were read"))
    place.prompts.write_text('{"prompt": "what?"}\n' + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=words):
        place.run(capsys)
    assert not place.out.exists() and not files.record_of(place.out).exists()


def test_a_template_that_refuses_is_quoted(place, capsys):
    refusal = "{{ raise_exception('System role not supported') }}"
    (place.model / "chat_template.jinja").write_text(refusal)
    with pytest.raises(InputError, match="prompt 'a': .*System role not supported"):
        place.run(capsys)


def test_nothing_verified_is_a_dash(place, capsys):
    decoding.main(
        ["--model", str(place.model), "--prompts", str(place.prompts), "--out", str(place.out)]
        + ["--max-new-tokens", "1"]
    )
    assert capsys.readouterr().out == "tau=- speedup=- identical=2/2 rates=-\n"
    assert summarise([json.loads(line) for line in place.out.read_text().splitlines()])["speedup"] is None


def test_another_head_takes_the_place_of_the_models_own(base_folder, tmp_path, monkeypatch):
    other = save_folder(tmp_path / "other", seed=5)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what?"}\n')
    used = []

    def compare(model, *_):
        used.append({name: tensor for name, tensor in model.net.state_dict().items() if "mtp_layers" in name})
        raise SystemExit

    monkeypatch.setattr(decoding, "compare", compare)
    common = ["--model", str(base_folder), "--prompts", str(tmp_path / "prompts.jsonl")]
    common += ["--out", str(tmp_path / "out.jsonl")]
    for flags in ([], ["--head", str(other)]):
        with pytest.raises(SystemExit):
            decoding.main([*common, *flags])
    for tensors, folder in zip(used, (base_folder, other), strict=True):
        head = read_head(folder)
        assert tensors.keys() == head.keys() and all(torch.equal(tensors[name], head[name]) for name in head)
