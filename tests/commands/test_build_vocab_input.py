"""The builder on bad input: one line that says what and where, and nothing left behind."""

from pathlib import Path

import pytest
from helpers.small_vocab import ENGLISH, command, leftovers, run, write

from fastmtp.cli import InputError
from fastmtp.vocab import corpus


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], (), "nothing to count"),
        ([""], (), "nothing to count"),
        ([{"text": "a"}, "{broken", {"text": "b"}], (), r"x\.jsonl:2: not JSON"),
        ([{"text": "a"}, "[1]"], (), r"x\.jsonl:2: expected a JSON object"),
        ([{"text": "a"}, r'{"text": "\ud800"}'], (), r"x\.jsonl:2: text that is not valid"),
        ([{"text": 5}], (), r"x\.jsonl:1: 'text' is neither"),
        ([{"a": "b"}], (), r"x\.jsonl:1: no messages, output_ids or text.*--column.*columns: a"),
        ([{"a": "b"}], ("--column", "c"), r"x\.jsonl:1: no column 'c'.*columns: a"),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            (),
            r"x\.jsonl:1: the chat has no assistant turn",
        ),
        (
            [{"messages": [{"role": "assistant", "content": None}]}],
            (),
            r"x\.jsonl:1: an assistant turn has neither",
        ),
        ([{"messages": [{"content": "a"}]}], (), r"x\.jsonl:1: a message without a role"),
        ([{"output_ids": [5, 381]}], (), r"x\.jsonl:1: token id 381 is not the tokenizer's"),
        ([{"output_ids": [-1]}], ("--on-error", "skip"), r"x\.jsonl:1: token id -1 is not the tokenizer's"),
        (
            [{"output_ids": [5], "messages": [{"role": "assistant", "content": "no"}]}],
            (),
            "do not spell the text",
        ),
        (
            [{"output_ids": [5], "messages": [{"role": "assistant", "content": "no"}]}],
            ("--column", "output_ids"),
            "do not spell the text",
        ),
        ([{"messages": None}], (), r"x\.jsonl:1: no messages, output_ids or text"),
        ([{"messages": "a"}, {"messages": 5}], (), r"x\.jsonl:2: 'messages' is neither"),
        ([{"messages": [None]}], (), r"x\.jsonl:1: 'messages' is neither"),
        ([{"messages": [{"role": "assistant", "content": "a"}, 5]}], (), r"x\.jsonl:1: a message without"),
        ([{"messages": [{"role": "assistant", "content": 5}]}], (), r"x\.jsonl:1: an assistant turn has"),
        ([r'{"\ud83d": 1}'], (), r"x\.jsonl:1: no messages"),
        ([r'{"messages": [{"role": "assistant", "content": "\ud83d"}]}'], (), r":1: text that is not valid"),
        ([{"text": "a"}], ("--lang", "other"), "lang 'other'"),
        ([{"text": "a"}], ("--lang", "zh,en"), "no text in 'zh'"),
        ([{"text": "a"}], ("--lang", "en,fr"), "'fr' cannot be told"),
        ([{"text": "a"}], ("--lang", "e n"), "lang 'e n'"),
        ([{"text": "a"}], ("--sizes", "8k"), "8192 is more than the tokenizer's 381 ids"),
        ([{"text": "a"}], ("--sizes", "100"), "100 is less than the 261 special and byte tokens"),
        ([{"text": "a"}], ("--sizes", "many"), "size 'many'"),
        ([{"text": "a"}], ("--held-out", "1"), "--held-out"),
        ([{"text": "a"}], ("--workers", "0"), "--workers"),
        ([{"text": "a"}], ("--compare", "nosuch.pt"), "nosuch.pt: no such token map"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(vocab_folder, tmp_path, rows, options, message):
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError, match=message) as error:
        run(vocab_folder, "--input", path, "--held-out", "0", *options, out=tmp_path / "o")
    assert "\n" not in str(error.value) and not leftovers(tmp_path / "o")


@pytest.mark.parametrize(
    "name, content", [("x.jsonl.gz", b"no gzip"), ("x.parquet", b"no parquet"), ("x.txt.gz", b"no")]
)
def test_damaged_files(vocab_folder, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        run(vocab_folder, "--input", tmp_path / name, out=tmp_path / "o")
    assert not leftovers(tmp_path / "o")


def test_a_cut_gzip_file(vocab_folder, tmp_path):
    whole = Path(
        write(tmp_path / "x.jsonl.gz", [{"response": f"{t} {i}"} for i in range(30) for t in ENGLISH])
    ).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut.jsonl.gz: damaged or cut off"):
        run(vocab_folder, "--input", tmp_path / "cut.jsonl.gz", "--column", "response", out=tmp_path / "o")


def test_a_parquet_column_that_does_not_exist(vocab_folder, tmp_path):
    path = write(tmp_path / "x.parquet", [{"a": "b"}])
    for column in (("--column", "c"), ()):
        with pytest.raises(InputError, match=r"x.parquet: no .*columns: a"):
            run(vocab_folder, "--input", path, *column, out=tmp_path / "o")


@pytest.mark.parametrize("name", ["nosuch.jsonl", "*.nosuch", "x.csv"])
def test_missing_and_unknown_files(vocab_folder, tmp_path, name):
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(InputError, match="no such file|unknown kind"):
        run(vocab_folder, "--input", tmp_path / name, out=tmp_path / "o")


def test_no_tokenizer(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "a"}])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no tokenizer"):
        run(str(tmp_path / "empty"), "--input", path, out=tmp_path / "o")


def test_skipping_broken_rows_counts_and_names_them(vocab_folder, tmp_path, capsys):
    good = [{"text": t} for t in ENGLISH]
    path = write(tmp_path / "x.jsonl", [good[0], "{broken", good[1], {"other": "x"}, good[2]])
    skip = ("--on-error", "skip", "--held-out", "0")
    run(vocab_folder, "--input", path, "--lang", "en", *skip, out=tmp_path / "o")
    printed = capsys.readouterr().out
    assert "2 broken rows skipped" in printed and "x.jsonl:2" in printed
    run(vocab_folder, "--input", write(tmp_path / "y.jsonl", good), "--lang", "en", *skip, out=tmp_path / "p")
    assert (tmp_path / "o" / "en_300.pt").read_bytes() == (tmp_path / "p" / "en_300.pt").read_bytes()


def test_text_that_is_not_utf8(vocab_folder, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"fine\n\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"x.txt:3: text that is not valid UTF-8"):
        run(vocab_folder, "--input", tmp_path / "x.txt", out=tmp_path / "o")
    skip = ("--on-error", "skip", "--held-out", "0")
    run(vocab_folder, "--input", tmp_path / "x.txt", *skip, out=tmp_path / "o")


def test_exit_code_and_one_line_on_stderr(vocab_folder, tmp_path):
    path = write(tmp_path / "x.jsonl", ["{broken"])
    process = command(vocab_folder, "--input", path, out=tmp_path / "o")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and err.count("\n") == 1 and "x.jsonl:1: not JSON" in err
    assert not leftovers(tmp_path / "o")


def test_rows_that_other_columns_do_not_spoil(vocab_folder, tmp_path):
    rows = [{"text": "a", "lang": None}, {"output_ids": [5], "messages": 7}, {"output_ids": [5], "lang": 3}]
    path = write(tmp_path / "x.jsonl", rows)
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())  # as Windows writes it
    run(vocab_folder, "--input", path, "--held-out", "0", out=tmp_path / "o")
    assert (tmp_path / "o" / "en_300.pt").exists()


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_line_that_is_too_long_is_refused_or_skipped_and_the_next_ones_are_read(
    vocab_folder, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(corpus, "LONGEST", 100)
    path = write(
        tmp_path / name, [{"text": "a"}, {"text": "b" * 350}, "", {"text": "c"}, {"text": "d" * 500}]
    )
    with pytest.raises(InputError, match=rf"{name}:2: longer than 0 MB; split or remove"):
        run(vocab_folder, "--input", path, "--held-out", "0", out=tmp_path / "o")
    run(vocab_folder, "--input", path, "--held-out", "0", "--on-error", "skip", out=tmp_path / "o")
    said = capsys.readouterr().out
    assert "2 rows, 2 tokens" in said and "2 broken rows skipped, the first" in said


def test_long_lines_of_plain_text_come_in_pieces(vocab_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "LONGEST", 200)
    monkeypatch.setattr(corpus, "PARAGRAPH", 99)
    (tmp_path / "x.txt").write_text("ä b " * 300, encoding="utf-8")
    run(vocab_folder, "--input", tmp_path / "x.txt", "--held-out", "0", out=tmp_path / "o")
    assert "0 rows" not in capsys.readouterr().out


@pytest.mark.parametrize("mine", ["en_300.pt", "en_350.json", "coverage.png"])
def test_a_file_of_the_user_s_stays(vocab_folder, tmp_path, mine):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / mine).write_bytes(b"mine")
    path = write(tmp_path / "x.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=f"{mine}: the file was not written by this project"):
        run(vocab_folder, "--input", path, "--lang", "en", out=tmp_path / "o")
    assert (tmp_path / "o" / mine).read_bytes() == b"mine"
