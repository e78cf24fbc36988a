r"""What two texts are compared by: their words, numbers and operators, in order.

Case, spacing and punctuation say nothing, so `Stop, now!` and `stop now` are one text. Operators say
everything: 17+5 and 17-5, x^2+4 and x^2-4, i++ and ++i, a<b and a>b are different questions, however few
their characters. Full-width forms count as the plain ones (NFKC).

Some characters are both. A hyphen, an asterisk, a bracket or an exclamation mark counts only in the company
that makes it an operator: `well-known`, `**bold**`, `(see below)` and `Stop!` are prose.
"""

from __future__ import annotations

import functools
import re
import unicodedata

_HAN = "\u3400-\u9fff"
# Mathematical signs and currencies beyond ASCII; a dot in the middle multiplies.
_SIGNS = "\u00b7" + "".join(
    c for c in map(chr, range(0x80, 0x3000)) if unicodedata.category(c) in ("Sm", "Sc")
)
_DECIMAL = r"\d+(?:\.\d+)+(?![^\W_])"
_WORD = rf"[{_HAN}]|[^\W_{_HAN}]+"
_NAME = rf"(?<![^\W_])[^\W\d_{_HAN}](?![^\W_])"  # a letter that stands alone, as names in formulas do
_FORMULA = r"-+*/%^<>=&|~\d()\[\]{}"  # what a bracket of a formula stands beside
UNIT = re.compile(
    rf"""
    {_DECIMAL} | {_WORD}
    | (?=[-!:'()\[\]{{}}\#+*/%^<>=&|~@{_SIGNS}])(?:                             # nothing else can follow
        [+*/%^<>=&|~@{_SIGNS}]
      | -(?=[>=]) | (?<=[+*/%^<>=!&|~])- | (?<=\w)--(?!\w) | (?<!\w)--(?=\w)    # ->, -=, i--, --flag
      | -(?=\s?[\d(]) | (?<=\d)- | (?<=[\d)\]]\s)- | -(?=\s?{_NAME}) | (?<=[)\]])-      # minus
      | (?<=[\d)\]])!+(?!=) | (?<=\b[^\W\d_])!+(?!=) | !(?=[=\w(])               # factorial, not, unequal
      | (?<=\d):(?=\d) | '(?=\()                                               # ratio or slice, derivative
      | [()\[\]{{}}](?=\s?[{_FORMULA}]) | (?<=[{_FORMULA}])[()\[\]{{}}]
      | [()\[\]{{}}](?={_NAME}) | (?<=\b[^\W\d_])[()\[\]{{}}]
      | (?<=[^\W\d_])\#                                                        # C#
    )
    """,
    re.VERBOSE,
)
_SUPERSCRIPTS = re.compile("[\u00b2\u00b3\u00b9\u2070-\u207f]+")
_BULLET = re.compile(r"^[ \t]*(?:[-*+>]+[ \t]+|[-=*_~]{3,}[ \t]*$)", re.MULTILINE)
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]*[^\s*])\1(?![\w*])")


@functools.lru_cache(4)  # a text is asked for its keys and for its signature
def units(text: str) -> tuple[str, ...]:
    """Lower-case words, numbers and operators of a text, in order; the text itself if it has none."""
    if not text.isascii():
        # x² is x to the power of 2, which NFKC would write x2.
        text = _SUPERSCRIPTS.sub(lambda m: f"^{m[0]}", text)
        text = unicodedata.normalize("NFKC", text)
        text = text.translate({0x2212: "-", 0x2044: "/"})
    text = _EMPHASIS.sub(r"\2", _BULLET.sub("", text))
    return tuple(UNIT.findall(" ".join(text.lower().split()))) or (text.strip(),)


def letters(parts: tuple[str, ...]) -> list[str]:
    """The units that are words. Two texts with the same ones differ in numbers and operators alone."""
    return [part for part in parts if part.isalpha()]
