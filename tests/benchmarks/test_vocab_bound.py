"""The bound on accept lengths with a map: by hand, and never under what a real head gets."""

import json

import numpy as np
import pytest
import torch

from benchmarks.dynamic_vocabulary import bound as vocab_bound
from fastmtp.cli import InputError
from fastmtp.reference.teacher_forced import measure_at
from fastmtp.vocab.draft_vocab import DraftVocab
from fastmtp.vocab.script_table import ScriptTable


def vocab(maps: dict[str, list[int]], size: int) -> DraftVocab:
    """Maps by name; no id tells a language, so that `auto` is always `mixed`."""
    scripts = ScriptTable(np.zeros(size, np.uint8), np.zeros(size, np.float32))
    return DraftVocab({name: torch.tensor(ids) for name, ids in maps.items()}, "auto", scripts)


def test_by_hand():
    maps = vocab({"en": [1, 2, 3], "mixed": [1, 9, 10]}, 20)
    sample = {"lang": "en", "prompt_ids": [8, 2], "output_ids": [7, 1, 2, 8, 3, 1]}
    found = vocab_bound.bound(maps, [sample], 2)
    passes = {name: part.verify_passes for (_, _, name), part in found.items()}
    # full: 7 | 1 2 8 | 3 1; en: 7 | 1 2 8 | 3 1; mixed: 7 | 1 2 | 8 | 3 | 1
    assert passes == {"full": 2, "en": 2, "mixed": 4, "union": 2, "auto": 4}


def test_no_head_passes_it(useful):
    samples = [
        {"prompt_ids": p, "output_ids": a} for p, a in zip(useful.prompts, useful.answers, strict=True)
    ]
    maps = vocab({"en": useful.token_map.tolist(), "mixed": list(range(0, 32, 2))}, 32)
    real = measure_at(useful.model, samples, [3], vocab=maps)[3]
    bound = vocab_bound.bound(maps, samples, 3)
    assert real.keys() <= bound.keys()
    for key, part in real.items():
        assert 1 < part.accept_length <= bound[key].accept_length, key


def test_the_file_is_one_that_vocab_cost_reads(base_folder, tmp_path, capsys):
    rows = [{"lang": lang, "prompt_ids": [5, 6], "output_ids": [9, 30, 31, 32]} for lang in ("en", "zh")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for lang, ids in (("en", range(40)), ("zh", range(20, 60))):
        torch.save(torch.tensor(ids), tmp_path / f"{lang}.pt")
    argv = [
        "--tokenizer",
        str(base_folder),
        "--token-maps",
        f"en={tmp_path}/en.pt,zh={tmp_path}/zh.pt",
        "--out",
        str(tmp_path / "b.json"),
    ]
    vocab_bound.main([*argv, "--data", str(tmp_path / "d.jsonl")])
    assert "| zh | union | 4 |" in capsys.readouterr().out
    from benchmarks.dynamic_vocabulary.cost_table import read_taus

    assert read_taus(str(tmp_path / "b.json"))["zh"]["union"] == 4.0
    (tmp_path / "short.jsonl").write_text(json.dumps(rows[0] | {"output_ids": [9]}) + "\n")
    with pytest.raises(InputError, match="no answer has two tokens"):
        vocab_bound.main([*argv, "--data", str(tmp_path / "short.jsonl")])
