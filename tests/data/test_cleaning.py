"""Each rule drops what it is named after, and leaves alone what only looks like it."""

import random

import pytest

from fastmtp.data.cleaning import CleanConfig, verdict

PROSE = """The harbour was quiet before the market opened. Two men carried crates of ice from the van to
the stalls, and a woman counted change into a tin. By six the boats had come in. The cats knew
it too: they sat along the wall in a row and looked at nobody in particular. When the first
fish was laid out, a gull took it, and everyone shouted at once."""
CODE = """Here is the function:

```python
def area(width, height):
    if width < 0:
        raise ValueError("width")
    if height < 0:
        raise ValueError("height")
    return width * height

print(area(1, 2))
print(area(3, 4))
print(area(5, 6))
```"""
TABLE = "| n | square |\n|---|---|\n" + "\n".join(f"| {n} | {n * n} |" for n in range(40))
SONG = """Row, row, row your boat, gently down the stream.
Merrily, merrily, merrily, merrily, life is but a dream."""
CHINESE = (
    "港口在市场开门之前很安静。两个男人把冰块从货车上搬到摊位，"
    "一位妇女把零钱数进铁罐里。六点钟船都回来了，猫也知道。"
)
MATHS = """First, $x + 3 = 7$, so $x = 4$. Then $2x = 8$ and $3x = 12$.

Therefore the sum is $8 + 12 = \\boxed{20}$."""
NUMBERED = "\n".join(
    f"{n}. {verb} the list for item {n} of the plan" for n, verb in enumerate("Open Read Sort Mark".split())
)


def judge(*answers, finish="stop", lang="", tokens=50, total=100, **config):
    return verdict(list(answers), finish, lang, tokens, total, CleanConfig(**config))


@pytest.mark.parametrize(
    "answer", [PROSE, CODE, TABLE, SONG, CHINESE, MATHS, NUMBERED, "Yes.", "42", "é", "👍"]
)
def test_good_answers_stay(answer):
    assert judge(answer) is None


@pytest.mark.parametrize("answer", ["", "  \n\t", "<think>I know.</think>", "<think>\n\n</think>\n\n"])
def test_empty(answer):
    assert judge(answer) == "empty"
    assert judge(PROSE, answer, PROSE) == "empty", "any turn counts"


def test_truncated_and_how_to_keep_it():
    assert judge(PROSE, finish="length") == "truncated"
    assert judge(PROSE, finish="length", drop_truncated=False) is None


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("<think>First I would", "unfinished_think"),
        ("<think>one</think> done. <think>and then", "unfinished_think"),
        ("<think>It is simple.</think>\n\nFour.", None),
        ("It is simple.</think>\n\nFour.", None),  # the template opened the block
        ("<think>It is simple.", "unfinished_think"),
    ],
)
def test_think_blocks(answer, reason):
    assert judge(answer) == reason


@pytest.mark.parametrize(
    "tokens, total, reason",
    [(4, 9, "too_short"), (5, 9, None), (21, 30, "too_long"), (20, 41, "too_long"), (20, 40, None)],
)
def test_length_range(tokens, total, reason):
    assert (
        judge(PROSE, tokens=tokens, total=total, min_tokens=5, max_tokens=20, max_total_tokens=40) == reason
    )


@pytest.mark.parametrize("period", [1, 2, 7, 30, 64])
def test_loops_of_any_period(period):
    unit = " ".join(f"word{n}" for n in range(period))
    repeats = max(6, 24 // period + 1)
    assert judge(f"{PROSE} {' '.join([unit] * repeats)} {PROSE[:50]}") == "loop"
    assert judge(f"{PROSE} {' '.join([unit] * 2)}") is None


def test_loop_in_chinese_and_cut_in_the_middle():
    assert judge(CHINESE + "我不知道" * 12 + "我不") == "loop"


def test_repeated_lines():
    # Never twice in a row, so no loop; three quarters of the lines were there before.
    rng = random.Random(0)
    lines = [
        f"Step {n}: open the {thing} and look inside"
        for n, thing in enumerate(("door", "box", "file", "book", "tin"))
    ]
    body = [line for _ in range(4) for line in rng.sample(lines, 5)]
    assert judge("\n".join(body)) == "repeated_lines"
    assert judge("\n".join(lines)) is None


def test_repeated_ngrams():
    # The same sentences again and again in another order: neither back to back nor whole lines.
    rng = random.Random(1)
    sentences = PROSE.replace("\n", " ").split(". ")
    assert (
        judge(". ".join(s for _ in range(4) for s in rng.sample(sentences, len(sentences))))
        == "repeated_ngrams"
    )
    assert judge(". ".join(sentences)) is None


@pytest.mark.parametrize(
    "answer, lang, reason",
    [
        (PROSE, "zh", "wrong_language"),
        (CHINESE, "en", "wrong_language"),
        (CHINESE, "zh", None),
        (PROSE, "en", None),
        (CODE, "zh", None),  # code is no language
        (PROSE, "fr", None),  # not among the languages that are checked
        (PROSE, "", None),
        ("OK, hello.", "zh", None),  # too little to tell
    ],
)
def test_language(answer, lang, reason):
    assert judge(answer, lang=lang) == reason
    assert judge(answer, lang=lang, languages=[]) is None


def test_a_script_that_is_not_told_apart_is_another_language():
    bengali = " ".join(
        ["\u0986\u09ae\u09bf \u09ac\u09be\u0982\u09b2\u09be\u09df \u0997\u09be\u09a8 \u0997\u09be\u0987"] * 12
    )
    lines = "\n".join(f"{n} {bengali}" for n in range(2))
    assert judge(bengali + " \u0985", lang="other", repeated_ngrams=1.0, loop_repeats=99) is None
    assert judge(lines, lang="en", repeated_ngrams=1.0, loop_repeats=99) == "wrong_language"
