"""Which language a text is in, from the scripts of its letters: enough to keep one token table per language.

Scripts tell Chinese from English, not English from French: every text in Latin letters is called `en`.
Letters are weighed by how much they say, because a token holds four or five Latin letters but only one or two
Chinese characters: a Chinese answer with a few English names or a formula in it stays Chinese, code with a
Chinese remark stays `en`.
"""

from __future__ import annotations

import re

LOOK_AT = 4000  # characters; an answer seldom changes its language after that, and longer looks cost time
WORD, IDEOGRAPH = 5.0, 1.5  # letters to about one token of text

_SCRIPTS = {
    "en": ("A-Za-z\u00c0-\u024f\u1e00-\u1eff", WORD),
    "zh": ("\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af", IDEOGRAPH),
    "ja": ("\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9d", IDEOGRAPH),
    "ko": ("\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3", IDEOGRAPH),
    "ru": ("\u0400-\u052f", WORD),
    "el": ("\u0370-\u03ff\u1f00-\u1fff", WORD),
    "he": ("\u0590-\u05ff", WORD),
    "ar": ("\u0600-\u06ff\u0750-\u077f", WORD),
    "hi": ("\u0900-\u097f", WORD),
    "th": ("\u0e00-\u0e7f", WORD),
}
_RUNS = {lang: (re.compile(f"[{letters}]+"), weight) for lang, (letters, weight) in _SCRIPTS.items()}

LANGUAGES = tuple(_SCRIPTS)


def letters(text: str) -> dict[str, float]:
    """How much of `text` is said in each language, in about tokens: its letters by script over letters a
    token.
    """
    return {lang: sum(map(len, runs.findall(text))) / weight for lang, (runs, weight) in _RUNS.items()}


def most(said: dict[str, float]) -> str:
    """The language with the largest part of `letters`; the first one, `en`, where there is no letter."""
    # Japanese is written in both: where kana are a fair part, the Chinese characters belong to it.
    if said["ja"] > 0.2 * said["zh"]:
        said = said | {"ja": said["ja"] + said["zh"], "zh": 0.0}
    return max(said, key=said.get)


def detect(text: str) -> str:
    """The language that most of the first 4,000 characters are in, one of LANGUAGES; `en` where there is no
    letter.
    """
    text = text[:LOOK_AT]
    return "en" if text.isascii() else most(letters(text))
