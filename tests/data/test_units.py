"""Operators and numbers tell prompts apart; case, spacing and punctuation do not."""

import random

import numpy as np
import pytest

from benchmarks.curate import operator_prompts
from fastmtp.data.dedup import DedupConfig, Questions, near_duplicates, signature
from fastmtp.data.scan import digest
from fastmtp.data.units import letters, units

DIFFERENT = """
17+5|17-5  17+5|17*5  17/5|17*5  x^2+4|x^2-4  i++|++i  i--|--i  i--|i++  a<b|a>b  a!=b|a==b
a=b|a==b  a<=b|a<b
x²|x2  x²|x³  １７＋５|17-5  1.5|15  1.5|1,5  2*(3+4)|(2*3)+4  (a+b)*c|a+(b*c)  a[i]|a(i)  f'(x)|f(x)  3÷4|3×4
!x|x  5!|5  n!|n  (n-1)!|(n-1)  20%|20  a->b|a-b  x-=1|x+=1  c#|c  c++|c  x>>2|x<<2  a**b|a*b  a//b|a/b  -5|5
3:4|3/4  A∩B|A∪B  x→y|x,y  ~x|x  −5|5  arr[-1]|arr[1]  f(-x)|f(x)  √2|2  ½|2  a^b|a|b
5−3|5+3  5€|5£  a&&b|a&b
小明有5－3个|小明有5＋3个  ａ＜ｂ|ａ＞ｂ  x≤3|x≥3  sin(x)+y|sin(x+y)
5-3|53  price-1|price+1
""".split()


@pytest.mark.parametrize("pair", DIFFERENT)
def test_operators_and_numbers_count(pair):
    left, _, right = pair.partition("|")
    assert units(left) != units(right)
    assert units(f"What is {left}, in words?") != units(f"What is {right}, in words?")


@pytest.mark.parametrize(
    "one, other",
    [
        ("Stop, now!", "stop now"),
        ("A well-known fact", "a Well known fact."),
        ("make **bold** text", "make bold text"),
        ("- item one\n- item two", "item one\nitem two"),
        ("(see below) please", "see below, please"),
        ("he said - well", "he said: well"),
        ("Title\n-----\ntext", "title text"),
        ("“什么”是猫？", "什么是猫"),
        ("１７＋５", "17 + 5"),
        ("17-5", "17   -   5"),
        ("f(-x)+1", "f( -x ) + 1"),
        ("x² − 1", "x^2-1"),
        ("ＡＢＣ", "abc"),
        ("???", " ??? "),
    ],
)
def test_case_spacing_and_punctuation_do_not(one, other):
    assert units(one) == units(other)


def test_two_thousand_prompts_that_differ_in_operators_and_numbers_all_stay():
    texts = operator_prompts(random.Random(5), 2000)
    parts = [units(text) for text in texts]
    assert len({digest(p) for p in parts}) == 2000
    keys = np.array([int.from_bytes(digest(p)[:8]) for p in parts], dtype=np.uint64)
    words = np.array([int.from_bytes(digest(letters(p))[:8]) for p in parts], dtype=np.uint64)
    signatures = np.stack([signature(text) for text in texts])
    twin, _, close = near_duplicates(signatures, signatures, DedupConfig(), words, keys)
    assert (twin < 0).all()
    assert close.any(), "none of them may be held out beside its like"


def test_benchmark_questions_of_other_operators_are_other_questions(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text('{"problem": "What is 17 + 5?"}\n{"problem": "Solve x^2 + 4 = 0"}\n')
    questions = Questions([str(path)], 0.5)
    assert (
        questions.find("what is 17+5") == f"{path}:1" and questions.find("Solve: x² + 4 = 0") == f"{path}:2"
    )
    assert not any(map(questions.find, ["What is 17 - 5?", "What is 17 * 5?", "Solve x^2 - 4 = 0"]))


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"turns": [null]}', "'turns' does not begin with a text"),
        ('{"turns": "", "problem": 7}', "'problem' does not begin with a text"),
        ('{"prompt": {"text": "x"}}', "'prompt' does not begin with a text"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 0 needs a text"),
        ('{"messages": "x"}', "must be a list"),
        ('{"question": "half \\ud83d"}', "not valid UTF-8"),
    ],
)
def test_questions_of_the_wrong_type_are_named(tmp_path, row, words):
    from fastmtp.cli import InputError

    path = tmp_path / "bench.jsonl"
    path.write_text('{"problem": "fine"}\n' + row + "\n")
    with pytest.raises(InputError, match=f"bench.jsonl:2: .*{words}"):
        Questions([str(path)], 0.5)
