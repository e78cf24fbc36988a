"""Token counts of a corpus against counts made by hand, on a small byte-level BPE tokenizer trained here."""

from collections import Counter as Tally

import pytest
from helpers.small_vocab import CHINESE, ENGLISH, count, tally, write
from transformers import PreTrainedTokenizerFast

from fastmtp.chat import IGNORE, encode_chat
from fastmtp.cli import InputError
from fastmtp.vocab import corpus, token_counts
from fastmtp.vocab.token_counts import COUNTED, HELD_OUT, Counter, Counts


@pytest.fixture(scope="module")
def tokenizer(vocab_folder):
    return PreTrainedTokenizerFast.from_pretrained(vocab_folder)


def test_exact_counts_of_a_hand_made_corpus(tokenizer, tmp_path):
    a, b, end = (tokenizer(t)["input_ids"] for t in ("a", "b", "<|im_end|>"))
    assert len(a) == len(b) == len(end) == 1
    path = write(tmp_path / "x.jsonl", [{"response": "a"}, {"response": "b"}, {"response": "a"}])
    assert tally(count(tokenizer, [path], "response")) == {a[0]: 2, b[0]: 1, end[0]: 3}
    path = write(tmp_path / "y.jsonl", [{"text": "a"}, {"text": "b"}])  # running text: no end token
    assert tally(count(tokenizer, [path])) == {a[0]: 1, b[0]: 1}


def test_chats_count_the_tokens_that_training_learns(tokenizer, tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ENGLISH[0]},
        {"role": "assistant", "content": ENGLISH[1]},
        {"role": "user", "content": CHINESE[0]},
        {"role": "assistant", "content": {"token_ids": [5, 6, 2]}},
    ]
    _, labels = encode_chat(tokenizer, chat)
    path = write(tmp_path / "x.jsonl", [{"messages": chat}])
    assert tally(count(tokenizer, [path])) == dict(Tally(i for i in labels if i != IGNORE))


def test_distilled_ids_are_used_as_they_are(tokenizer, tmp_path):
    rows = [
        {
            "prompt_ids": [9, 9],
            "output_ids": [40, 41, 40, 2],
            "messages": [{"role": "user", "content": "hello"}],
        }
    ]
    assert tally(count(tokenizer, [write(tmp_path / "a.jsonl", rows)])) == {40: 2, 41: 1, 2: 1}
    # A given answer in the history is not the model's; its own turns carry their ids, the last one's are
    # output_ids.
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "given"},
        {"role": "user", "content": "q"},
    ]
    last = {"role": "assistant", "content": tokenizer.decode([40, 41, 2], skip_special_tokens=True)}
    rows = [{"prompt_ids": [9], "output_ids": [40, 41, 2], "messages": [*turns, last]}]
    assert tally(count(tokenizer, [write(tmp_path / "b.jsonl", rows)])) == {40: 1, 41: 1, 2: 1}
    both = [turns[0], {"role": "assistant", "content": tokenizer.decode([50]), "token_ids": [50]}, turns[2]]
    rows = [
        {
            "prompt_ids": [9],
            "output_ids": [40, 41, 2],
            "messages": [*both, {**last, "token_ids": [40, 41, 2]}],
        }
    ]
    assert tally(count(tokenizer, [write(tmp_path / "c.jsonl", rows)])) == {50: 1, 40: 1, 41: 1, 2: 1}


def test_every_kind_of_file_gives_the_same_counts(tokenizer, tmp_path):
    rows = [{"text": t} for t in ENGLISH + CHINESE]
    expected = tally(count(tokenizer, [write(tmp_path / "x.jsonl", rows)]))
    assert tally(count(tokenizer, [write(tmp_path / "x.jsonl.gz", rows)])) == expected
    assert tally(count(tokenizer, [write(tmp_path / "x.parquet", rows)])) == expected
    assert expected == dict(Tally(i for row in rows for i in tokenizer(row["text"])["input_ids"]))


def test_parquet_chats(tokenizer, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": t}]} for t in ENGLISH
    ]
    lines, columns = (write(tmp_path / name, rows) for name in ("x.jsonl", "x.parquet"))
    assert tally(count(tokenizer, [columns])) == tally(count(tokenizer, [lines]))


def test_txt_paragraphs_keep_their_newlines(tokenizer, tmp_path):
    text = "One line.\nAnd one more.\n\n\nA paragraph.\n\nThe last"
    (tmp_path / "x.txt").write_text(text)
    chunk = next(corpus.file_chunks([tmp_path / "x.txt"], None))
    assert [row.content for row in chunk.rows] == [
        "One line.\nAnd one more.\n\n\n",
        "A paragraph.\n\n",
        "The last",
    ]
    assert [row.where.rsplit(":", 1)[1] for row in chunk.rows] == ["1", "5", "7"]
    assert tally(count(tokenizer, [str(tmp_path / "x.txt")])) == dict(Tally(tokenizer(text)["input_ids"]))


def test_a_data_set_is_streamed_from_a_local_folder(tokenizer, tmp_path):
    rows = [{"instruction": "q", "response": t} for t in ENGLISH]
    (tmp_path / "set").mkdir()
    path = write(tmp_path / "set" / "train.jsonl", rows)
    counter = Counter(tokenizer, "response", "en", 0.0, 0, False)
    counts = Counts(counter.size)
    counter.count(corpus.dataset_chunks(str(tmp_path / "set"), "train", "response"), counts)
    assert counts.rows == 3 and tally(counts) == tally(count(tokenizer, [path], "response"))
    with pytest.raises(InputError, match="--split"):
        next(corpus.dataset_chunks(str(tmp_path / "set"), "nosuch", None))
    with pytest.raises(InputError, match="--dataset"):
        next(corpus.dataset_chunks(str(tmp_path / "nosuch"), "train", None))


def test_languages_have_their_own_tables(tokenizer, tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": t} for t in ENGLISH + CHINESE])
    english = write(tmp_path / "en.jsonl", [{"text": t} for t in ENGLISH])
    counts = count(tokenizer, [path], lang=None)
    assert set(counts.tables) == {"en", "zh"}
    assert tally(counts) == tally(count(tokenizer, [english]))
    ids = [{"output_ids": tokenizer(CHINESE[0])["input_ids"]}]  # no text beside the ids: they are decoded
    assert set(count(tokenizer, [write(tmp_path / "ids.jsonl", ids)], lang=None).tables) == {"zh"}


def test_held_out_rows_are_counted_apart_and_copies_stay_together(tokenizer, tmp_path):
    rows = [{"text": f"sentence number {i}"} for i in range(400)]
    once = count(tokenizer, [write(tmp_path / "x.jsonl", rows)], held_out=0.25).tables["en"]
    twice = count(tokenizer, [write(tmp_path / "y.jsonl", rows + rows[::-1])], held_out=0.25).tables["en"]
    whole = count(tokenizer, [str(tmp_path / "x.jsonl")]).tables["en"]
    assert (2 * once == twice).all() and (once.sum(0) == whole[COUNTED]).all() and not whole[HELD_OUT].any()
    assert 0.15 < once[HELD_OUT].sum() / once.sum() < 0.35
    other = count(tokenizer, [str(tmp_path / "x.jsonl")], held_out=0.25, seed=1).tables["en"]
    assert (other != once).any()


def test_long_texts_are_tokenised_in_pieces_and_counted_whole(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", [{"text": " ".join(ENGLISH * 5)}, {"text": "a" * 500}])
    whole = tally(count(tokenizer, [path]))
    monkeypatch.setattr(token_counts, "PIECE", 64)
    assert "".join(token_counts.pieces("ab cd" * 50)) == "ab cd" * 50
    assert tally(count(tokenizer, [path])) == whole
