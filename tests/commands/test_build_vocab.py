"""The map builder: which ids are picked, what the command writes, how a stopped count goes on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_vocab import CHINESE, ENGLISH, command, count, leftovers, run, write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastmtp.build_vocab import forced_ids, pick, rank, union_rank
from fastmtp.cli import InputError
from fastmtp.vocab import corpus, token_counts
from fastmtp.vocab.coverage import coverage
from fastmtp.vocab.token_counts import HELD_OUT, Counts
from fastmtp.vocab.token_map import load_token_map


@pytest.fixture(scope="module")
def tokenizer(vocab_folder):
    return PreTrainedTokenizerFast.from_pretrained(vocab_folder)


def test_rank_breaks_ties_by_id():
    assert rank(np.array([0, 3, 5, 3, 0, 9])).tolist() == [5, 2, 1, 3]


def test_union_takes_each_id_at_its_best_rank():
    assert union_rank([np.array([4, 1, 2]), np.array([5, 2, 6])], 8).tolist() == [4, 5, 1, 2, 6]


def test_pick_forced_first_then_rank_then_low_ids():
    vocab = np.array([0, 1, 2, 3, 4, 5, 7, 8])
    ids, filled = pick(np.array([8, 5]), np.array([3]), vocab, 2)
    assert ids.tolist() == [3, 8] and filled == 0
    ids, filled = pick(np.array([8, 5]), np.array([3]), vocab, 5)
    assert ids.tolist() == [0, 1, 3, 5, 8] and filled == 2
    assert pick(np.array([8, 5]), np.array([3]), vocab, 8)[0].tolist() == vocab.tolist()


def test_coverage():
    assert coverage(np.array([0, 2]), np.array([1, 2, 3])) == pytest.approx(4 / 6)
    assert coverage(np.array([0]), np.zeros(3)) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 99), max_size=60), min_size=1, max_size=3),
    st.integers(10, 100),
    st.data(),
)
def test_any_corpus_gives_exact_sizes_no_duplicates_and_the_best_counted_coverage(texts, size, data):
    forced = np.array(sorted(data.draw(st.sets(st.integers(0, 99), max_size=10))), dtype=np.int64)
    tables = [np.bincount(np.array(text, dtype=np.int64), minlength=100) for text in texts]
    for table in tables:
        ids, filled = pick(rank(table), forced, np.arange(100), size)
        assert len(ids) == size and (np.diff(ids) > 0).all() and np.isin(forced, ids).all()
        assert filled == size - len(forced) - np.isin(np.setdiff1d(np.flatnonzero(table), forced), ids).sum()
        free = sorted(np.delete(table, forced), reverse=True)[: size - len(forced)]
        assert table[ids].sum() == table[forced].sum() + sum(free)  # nothing of that size covers more
    ranking = union_rank([rank(table) for table in tables], 100)
    assert sorted(ranking) == np.flatnonzero(sum(tables)).tolist()
    ids, _ = pick(ranking, forced, np.arange(100), size)
    assert len(ids) == size and np.isin(forced, ids).all()


def test_forced_ids(tokenizer, vocab_folder):
    forced = forced_ids(tokenizer, vocab_folder).tolist()
    vocab = tokenizer.get_vocab()
    special = {vocab[t] for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")}
    assert special | {300} | {vocab[c] for c in pre_tokenizers.ByteLevel.alphabet()} == set(forced)


@pytest.fixture
def mixed(tmp_path) -> str:
    rows = [{"response": f"{t} {i}"} for i in range(30) for t in ENGLISH + CHINESE]
    return write(tmp_path / "pairs.jsonl.gz", rows)


def test_command_end_to_end(vocab_folder, tokenizer, mixed, tmp_path, capsys):
    torch.save([3, 2, 2, 300], tmp_path / "theirs.pt")
    options = (
        "--column",
        "response",
        "--lang",
        "en,zh",
        "--held-out",
        "0.2",
        "--compare",
        tmp_path / "theirs.pt",
    )
    run(vocab_folder, "--input", mixed, *options, out=tmp_path / "o")
    printed = capsys.readouterr().out
    forced = set(forced_ids(tokenizer, vocab_folder).tolist())
    for lang in ("en", "zh", "union"):
        for size in (300, 350):
            # As SGLang reads it.
            ids = torch.tensor(
                torch.load(tmp_path / "o" / f"{lang}_{size}.pt", weights_only=True).tolist()
            ).tolist()
            assert len(ids) == len(set(ids)) == size and ids == sorted(ids) and forced <= set(ids)
            info = json.loads((tmp_path / "o" / f"{lang}_{size}.json").read_text())
            assert info["size"] == size and info["lang"] == lang and info["corpus"] == "pairs.jsonl.gz"
            shares = info["coverage_of_held_out"]
            assert f"{100 * shares['en']:.2f}%" in printed and f"{100 * shares['zh']:.2f}%" in printed
    english, chinese = (json.loads((tmp_path / "o" / f"{n}_300.json").read_text()) for n in ("en", "zh"))
    assert english["coverage_of_held_out"]["en"] > chinese["coverage_of_held_out"]["en"]
    assert chinese["coverage_of_held_out"]["zh"] > english["coverage_of_held_out"]["zh"]
    assert "theirs.pt" in printed and "share" in printed
    assert (tmp_path / "o" / "coverage.png").read_bytes()[:4] == b"\x89PNG" and (
        tmp_path / "o" / "run.json"
    ).exists()
    assert not [name for name in leftovers(tmp_path / "o") if name.startswith(".")]


def test_coverage_is_measured_on_text_that_was_not_counted(vocab_folder, tokenizer, tmp_path):
    """Every row has a token of its own kind, so counted text would show full coverage, held-out text must
    not.
    """
    rare = [tokenizer.decode([i]) for i in range(300, 380)]
    path = write(tmp_path / "x.jsonl", [{"text": t} for t in rare])
    run(vocab_folder, "--input", path, "--lang", "en", "--held-out", "0.3", out=tmp_path / "o", sizes="330")
    counts = count(tokenizer, [path], held_out=0.3)
    ids = load_token_map(tmp_path / "o" / "en_330.pt", 1000).numpy()
    share = json.loads((tmp_path / "o" / "en_330.json").read_text())["coverage_of_held_out"]["en"]
    assert share == pytest.approx(coverage(ids, counts.tables["en"][HELD_OUT])) and share < 1


def test_auto_leaves_out_what_is_hardly_there(vocab_folder, tmp_path, capsys):
    rows = [{"text": t} for t in ENGLISH * 60 + CHINESE * 60] + [{"text": "Привет"}]
    run(vocab_folder, "--input", write(tmp_path / "x.jsonl", rows), out=tmp_path / "o", sizes="300")
    names = {p.stem for p in (tmp_path / "o").glob("*.pt")}
    assert names == {"en_300", "zh_300", "union_300"} and "ru" in capsys.readouterr().out


def test_filled_ids_are_told(vocab_folder, tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "a"}])
    run(vocab_folder, "--input", path, "--lang", "en", "--held-out", "0", out=tmp_path / "o", sizes="300")
    info = json.loads((tmp_path / "o" / "en_300.json").read_text())
    assert info["ids_not_in_corpus"] == 300 - info["ids_forced"] and info["coverage_of_held_out"] == {
        "en": None
    }


def test_one_and_two_workers_give_the_same_files(vocab_folder, mixed, tmp_path):
    options = ("--input", mixed, "--column", "response", "--lang", "auto")
    both = [command(vocab_folder, *options, "--workers", n, out=tmp_path / str(n)) for n in (1, 2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    names = sorted(p.name for p in (tmp_path / "1").glob("*") if p.suffix in (".pt", ".png"))
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def interrupt(vocab_folder: str, monkeypatch, *options, out: Path) -> None:
    """Run the command, stopped by a keyboard interrupt at its sixth chunk."""
    monkeypatch.setattr(corpus, "CHUNK", 1000)
    monkeypatch.setattr(token_counts, "SAVE_EVERY", 0.0)
    add, calls = Counts.add, []

    def stop_at_sixth(self, *args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Counts, "add", stop_at_sixth)
        with pytest.raises(SystemExit) as stopped:
            run(vocab_folder, *options, out=out)
    assert stopped.value.code == 1 and len({*leftovers(out)} - {"run.json"}) == 1


def test_a_worker_s_complaint_arrives_whole(vocab_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 100)
    path = write(tmp_path / "x.jsonl", [{"text": t} for t in ENGLISH * 20] + ["{broken"])
    with pytest.raises(InputError, match=r"x\.jsonl:61: not JSON .*--on-error skip"):
        run(vocab_folder, "--input", path, "--workers", "2", out=tmp_path / "o")
    assert not leftovers(tmp_path / "o")


def test_resume_gives_what_an_uninterrupted_count_gives(vocab_folder, mixed, tmp_path, monkeypatch, capsys):
    options = ("--input", mixed, "--column", "response", "--lang", "en,zh")
    run(vocab_folder, *options, out=tmp_path / "whole")
    interrupt(vocab_folder, monkeypatch, *options, out=tmp_path / "o")
    assert "--resume" in capsys.readouterr().err
    run(vocab_folder, *options, "--resume", out=tmp_path / "o")
    assert "continuing after" in capsys.readouterr().err
    for path in (tmp_path / "whole").glob("*.pt"):
        assert path.read_bytes() == (tmp_path / "o" / path.name).read_bytes()
    assert not [name for name in leftovers(tmp_path / "o") if name.startswith(".")]


@pytest.mark.parametrize("change", [("--resume", "--seed", "1"), ()])
def test_a_count_is_continued_only_when_asked_and_by_the_same_rules(
    vocab_folder, mixed, tmp_path, monkeypatch, capsys, change
):
    options = ("--input", mixed, "--column", "response", "--lang", "en")
    interrupt(vocab_folder, monkeypatch, *options, out=tmp_path / "o")
    run(vocab_folder, *options, *change, out=tmp_path / "o")
    assert "continuing" not in capsys.readouterr().err
    run(vocab_folder, *options, *change, out=tmp_path / "whole")
    assert (tmp_path / "whole" / "en_300.pt").read_bytes() == (tmp_path / "o" / "en_300.pt").read_bytes()


@pytest.mark.parametrize("same", [True, False])
def test_a_count_is_continued_by_what_the_corpus_holds_not_by_its_times(
    vocab_folder, tmp_path, monkeypatch, capsys, same
):
    path = write(tmp_path / "x.jsonl", [{"text": f"{text} {i}"} for i in range(40) for text in ENGLISH])
    options = ("--input", path, "--lang", "en")
    interrupt(vocab_folder, monkeypatch, *options, out=tmp_path / "o")
    stat = os.stat(path)
    if not same:  # as long as before, and with the same times
        Path(path).write_text(Path(path).read_text().replace("1", "2"))
    os.utime(path, (0, 0) if same else (stat.st_atime, stat.st_mtime))
    run(vocab_folder, *options, "--resume", out=tmp_path / "o")
    assert ("continuing after" in capsys.readouterr().err) == same


UNKNOWN = {
    "Bengali": "নদীর জল আজ শান্ত আকাশ পরিষ্কার",
    "Georgian": "ტყეში ჩიტები მღერიან",
    "Amharic": "ወንዙ ዛሬ ጸጥ ብሏል",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_scripts_that_are_not_known_are_left_out_and_counted(vocab_folder, tokenizer, tmp_path, capsys, name):
    known = [{"text": text} for text in ENGLISH]
    path = write(tmp_path / "x.jsonl", known + [{"text": UNKNOWN[name]}] * 5)
    run(vocab_folder, "--input", path, "--held-out", "0", out=tmp_path / "o")
    tokens = 5 * len(tokenizer(UNKNOWN[name])["input_ids"])
    said = capsys.readouterr().out
    assert f"left out, no map made: other {tokens} tokens in scripts that we cannot tell apart" in said
    run(vocab_folder, "--input", write(tmp_path / "y.jsonl", known), "--held-out", "0", out=tmp_path / "p")
    assert (tmp_path / "o" / "en_300.pt").read_bytes() == (tmp_path / "p" / "en_300.pt").read_bytes()
    assert not [*(tmp_path / "o").glob("other*")] and not [*(tmp_path / "o").glob("union*")]
    with pytest.raises(InputError, match=r"all text to count .* --lang NAME"):
        only = write(tmp_path / "z.jsonl", [{"text": UNKNOWN[name]}])
        run(vocab_folder, "--input", only, "--held-out", "0", out=tmp_path / "q")
