"""Near-duplicates: recall and false removals with planted copies, agreement with exact similarity, benchmark
questions.
"""

import json
import random

import numpy as np
import pytest

from fastmtp.cli import InputError
from fastmtp.data.dedup import DedupConfig, Questions, near_duplicates, shingles, signature, similar_pairs

LATIN = [a + b + c for a in "bdfgklmnprst" for b in ("a", "e", "io", "u") for c in ("n", "r", "st", "l", "")]
HAN = [chr(0x4E00 + 7 * n) for n in range(800)]


def text(rng, length, units=LATIN):
    """Words as unevenly used as in real text: the commonest makes up some 8 % of it."""
    weights = [1 / (rank + 3) for rank in range(len(units))]
    return rng.choices(units, weights, k=length)


def edit(rng, units, count, vocabulary):
    units = list(units)
    for place in rng.sample(range(len(units)), count):
        word = rng.choice(vocabulary)
        units[place] = rng.choice(([word], [], [units[place], word]))
    return [w for unit in units for w in ([unit] if isinstance(unit, str) else unit)]


@pytest.fixture(scope="module")
def planted():
    """2,000 samples, 5 % of them copies of others with up to 10 % of the words edited, half of them by
    exactly 10 %.
    """
    rng = random.Random(3)
    rows = []
    for n in range(1900):
        units, glue = (HAN, "") if n % 4 == 0 else (LATIN, " ")
        rows.append(
            (
                glue.join(text(rng, rng.randint(6, 30), units)),
                text(rng, rng.randint(12, 200), units),
                glue,
                -1,
            )
        )
    for n, original in enumerate(rng.sample(range(1900), 100)):
        prompt, answer, glue, _ = rows[original]
        most = max(1, len(answer) // 10)
        count = most if n % 2 else rng.randint(1, most)
        rows.append((prompt, edit(rng, answer, count, HAN if glue == "" else LATIN), glue, original))
    order = list(range(len(rows)))
    rng.shuffle(order)
    where = {old: new for new, old in enumerate(order)}
    texts = [(rows[k][0], f"{rows[k][0]}\n{rows[k][2].join(rows[k][1])}") for k in order]
    return texts, [(where[row[3]], where[k]) for k, row in enumerate(rows) if row[3] >= 0]


@pytest.mark.parametrize("prompts_too", [True, False])
def test_planted_copies_are_found_and_nothing_else(planted, prompts_too):
    texts, pairs = planted
    config = DedupConfig() if prompts_too else DedupConfig(prompt_threshold=None)
    samples = np.stack([signature(whole) for _, whole in texts])
    prompts = np.stack([signature(prompt) for prompt, _ in texts])
    twin, similarity, close = near_duplicates(samples, prompts, config)
    found = sum(twin[max(pair)] == min(pair) for pair in pairs)
    wrong = set(np.flatnonzero(twin >= 0).tolist()) - {max(pair) for pair in pairs}
    assert found / len(pairs) >= 0.95
    assert len(wrong) / len(texts) <= 0.01
    assert (twin < np.arange(len(texts))).all(), "the earlier one stays"
    assert (similarity[twin >= 0] >= config.threshold).all()
    assert not close[twin >= 0].any(), "only kept samples are marked"


def test_similarity_is_that_of_the_exact_sets():
    rng = random.Random(5)
    base = text(rng, 150)
    texts = [" ".join(edit(rng, base, count, LATIN)) for count in (0, 3, 5, 8, 10, 12)]
    exact = [set(shingles(t, 2).tolist()) for t in texts]
    truth = {
        (a, b): len(exact[a] & exact[b]) / len(exact[a] | exact[b]) for a in range(6) for b in range(a + 1, 6)
    }
    found = {
        (a, b): value
        for a, b, value in zip(*map(np.ndarray.tolist, similar_pairs(_stack(texts), 0.4)), strict=True)
    }
    assert found.keys() >= {pair for pair, value in truth.items() if value > 0.65}
    for pair, value in found.items():
        assert value == pytest.approx(
            truth[pair], abs=0.15
        )  # about 3.5 standard deviations of 128 permutations


def _stack(texts):
    return np.stack([signature(t) for t in texts])


def test_all_pairs_of_small_sets_match_brute_force(planted):
    texts, _ = planted
    signatures = np.stack([signature(whole) for _, whole in texts[:400]])
    i, j, score = similar_pairs(signatures, 0.62)
    a, b = np.triu_indices(400, 1)
    brute = (signatures[a] == signatures[b]).mean(axis=1)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == {
        (x, y) for x, y, value in zip(a.tolist(), b.tolist(), brute, strict=True) if value >= 0.62
    }
    assert (np.diff(j << 32 | i) > 0).all()


def test_nothing_falls_for_a_sample_that_fell_itself():
    # A chain: each is close to the next, the ends are not. The second falls for the first, so the third
    # stays.
    rng = random.Random(11)
    first = text(rng, 200)
    second = edit(rng, first, 20, LATIN)
    third = edit(rng, second, 20, LATIN)
    signatures = np.stack([signature(" ".join(t)) for t in (first, second, third)])
    score = [(signatures[a] == signatures[b]).mean() for a, b in ((0, 1), (1, 2), (0, 2))]
    assert min(score[:2]) > 0.62 > score[2], score
    twin, _, close = near_duplicates(signatures, signatures, DedupConfig(prompt_threshold=None))
    assert twin.tolist() == [-1, 0, -1]
    assert close.tolist() == [score[2] >= 0.52, False, score[2] >= 0.52]


def test_crowds_stay_cheap_and_complete():
    same = np.tile(signature("the same words in all of them"), (3000, 1))
    twin, _, _ = near_duplicates(same, same, DedupConfig())
    assert twin[0] == -1 and (twin[1:] == 0).all()


@pytest.mark.parametrize("empty", ["", "???", "😀 !", "x"])
def test_texts_without_words_are_told_apart(empty):
    assert len(shingles(empty, 2)) == 1
    other = signature("+++")
    assert (signature(empty) == other).mean() < 0.5


QUESTION = (
    "A train leaves the station at nine and travels two hundred miles at fifty miles an hour. When does it "
    "arrive at the next town if it stops for a quarter of an hour on the way?"
)


@pytest.fixture
def questions(tmp_path):
    """One file in the form of each of the seven benchmarks."""
    passage = "The bridge was built in the last century by a company from the north.\n"
    passage += "Who built the bridge over the river?"
    rows = {
        "mt_bench": {
            "turns": ["Compose a letter to the mayor of a small town about its trees", "Make it shorter."]
        },
        "livecodebench": {
            "question_content": "Given an array of n integers print the longest run of equal ones"
        },
        "math": {"problem": QUESTION},
        "nq": {"turns": ["Who played anna in once upon a time?"]},
        "rag": {"turns": [passage]},
        "c_eval": {"question": "以下是中国关于注册会计师考试的单项选择题，请选出其中的正确答案。"},
        "chat": {
            "messages": [
                {"role": "user", "content": "Name the nine planets that Holst did and did not set to music"}
            ]
        },
    }
    paths = []
    for name, row in rows.items():
        paths.append(str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return Questions(paths, 0.5)


@pytest.mark.parametrize(
    "prompt, name",
    [
        (QUESTION, "math"),
        (f"Solve this step by step.\n\n{QUESTION.upper()}\nAnswer:", "math"),
        (QUESTION.replace("nine", "ten").replace("fifty", "sixty").replace("quarter", "third"), "math"),
        ("who played Anna in Once upon a Time", "nq"),
        ("Who built the bridge over the river?", "rag"),
        ("请回答：以下是中国关于注册会计师考试的单项选择题，请选出其中的正确答案。", "c_eval"),
        ("Given an array of n integers, print the longest run of equal ones.", "livecodebench"),
        ("Name the nine planets that Holst did and did not set to music", "chat"),
        ("Who played the piano in the last film of the year?", None),
        ("Make it shorter.", None),
        ("A train leaves the station at nine.", None),
        ("", None),
    ],
)
def test_benchmark_questions_are_found(questions, prompt, name):
    found = questions.find(prompt)
    assert (found is None) == (name is None)
    assert name is None or f"{name}.jsonl:1" in found


def test_question_file_without_questions(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "no question here"}\n')
    with pytest.raises(InputError, match=r"other.jsonl:1: no question found"):
        Questions([str(path)], 0.5)
    assert Questions([], 0.5).find("anything") is None
