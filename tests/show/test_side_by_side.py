"""One answer twice: the marks are on the accepted drafts, and the text under them is untouched."""

import io
import re

import pytest

from fastmtp.show.side_by_side import comparison, drafted, has_colours, text_of

WORDS = ["The", " cat", " sat", " on", " the", "\n", "mat", "."]
FLAGS = drafted(len(WORDS), [2, 0, 3])


def decode(ids) -> str:
    return "".join(WORDS[i] for i in ids)


def shown(width: int, colours: bool) -> str:
    ids = range(len(WORDS))
    plain = text_of(ids, [False] * len(WORDS), decode)
    return comparison([("plain", plain), ("drafts", text_of(ids, FLAGS, decode))], width, colours)


def test_each_pass_brings_its_drafts_and_one_token_of_the_models_own():
    assert FLAGS == [False, True, True, False, False, True, True, True]
    assert drafted(4, [1, 3]) == [False, True, False, True]  # the limit cut the second pass


def test_a_log_gets_brackets_one_answer_under_the_other():
    assert shown(60, False) == "plain\nThe cat sat on the\nmat.\n\ndrafts\nThe[ cat sat] on the[\nmat.]"


def test_a_wide_terminal_gets_two_columns_with_the_drafts_in_green():
    lines = shown(103, True).split("\n")
    assert [line.index(" | ") for line in lines] == [50, 50, 50]
    assert lines[1].endswith("The\x1b[1;32m cat sat\x1b[0m on the")
    plain = re.sub(r"\x1b\[[\d;]*m", "", lines[2])
    assert plain.split(" | ")[0].strip() == plain.split(" | ")[1] == "mat."


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("width", [5, 20, 131])
def test_long_lines_are_broken_at_spaces_and_lose_nothing(width, colours):
    words = ("plain words and averyveryverylongone " * 9).split(" ")[:-1]
    tokens = [" " * bool(i) + word for i, word in enumerate(words)]
    flags = [i % 3 == 1 for i in range(len(tokens))]
    text = text_of(range(len(tokens)), flags, lambda ids: "".join(tokens[i] for i in ids))
    page = re.sub(r"\x1b\[[\d;]*m", "", comparison([("a", text), ("b", text)], width, colours))
    assert max(map(len, page.split("\n"))) <= width
    if width < 100:
        first = page.split("\n\n")[0].removeprefix("a\n")
        assert re.sub(r"[\s\[\]]", "", first) == "".join(words)


def test_half_a_character_waits_and_a_terminals_commands_are_left_out():
    half = {0: "\ufffd", 1: "é", 2: "é\x1b[2J!"}
    text = text_of([7, 8, 9], [True, False, True], lambda ids: half[len(ids) - 1])
    assert text == [("é", False), ("[", True), ("2", True), ("J", True), ("!", True)]


@pytest.mark.parametrize(
    "terminal, no_color, colours", [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, terminal, no_color, colours):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert has_colours(stream) is colours
