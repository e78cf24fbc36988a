"""Which language a text is in, from the scripts of its letters: enough to keep one token table per language.

Scripts tell Chinese from English, not English from French: every text in Latin letters is called `en`. A text
in a script that is not listed here is called `other`, never by the name of a language that it is not in.
Letters are weighed by how much they say, because a token holds four or five Latin letters but only one or two
Chinese characters: a Chinese answer with a few English names or a formula in it stays Chinese, code with a
Chinese remark stays `en`.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter

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
_KNOWN = re.compile("[\x00-\x7f" + "".join(letters for letters, _ in _SCRIPTS.values()) + "]+")
# First words of Unicode names, for letters of the scripts above in other blocks; None: letters of no script.
_NAMED = {"LATIN": "en", "CJK": "zh", "BOPOMOFO": "zh", "IDEOGRAPHIC": None, "HIRAGANA": "ja"}
_NAMED |= {"KATAKANA": "ja", "HANGUL": "ko", "CYRILLIC": "ru", "GREEK": "el", "HEBREW": "he", "ARABIC": "ar"}
_NAMED |= {"DEVANAGARI": "hi", "VEDIC": "hi", "THAI": "th", "MODIFIER": None, "COMBINING": None}
_NAMED |= {"VARIATION": None, "TURNED": None}

LANGUAGES = tuple(_SCRIPTS)
OTHER = "other"


def letters(text: str) -> dict[str, float]:
    """How much of `text` is in each of LANGUAGES and OTHER, in tokens: letters over letters per token."""
    said = {lang: sum(map(len, runs.findall(text))) / weight for lang, (runs, weight) in _RUNS.items()}
    said[OTHER] = 0.0
    for character, count in Counter(_KNOWN.sub("", text)).items():
        if lang := _language_of(character):
            said[lang] += count / (_SCRIPTS[lang][1] if lang in _SCRIPTS else WORD)
    return said


@functools.lru_cache(1 << 14)
def _language_of(character: str) -> str | None:
    """Of a character outside the blocks above; None if it is no letter, or one that every language uses."""
    if unicodedata.category(character)[0] not in "LM":  # marks are the vowels of many scripts
        return None
    # Letters that stand for others: mathematical, fullwidth, presentation forms.
    plain = unicodedata.normalize("NFKD", character)[0]
    for lang, (runs, _) in _RUNS.items():
        if runs.match(plain):
            return lang
    name = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
    return _NAMED.get(name, OTHER)


def most(said: dict[str, float]) -> str:
    """The language with the largest part of `letters`; the first one, `en`, if there is no letter."""
    # Japanese is written in both: if kana are a fair part, the Chinese characters belong to it.
    if said["ja"] > 0.2 * said["zh"]:
        said = said | {"ja": said["ja"] + said["zh"], "zh": 0.0}
    return max(said, key=said.get)


def detect(text: str) -> str:
    """The language of most of the first 4,000 characters: one of LANGUAGES or OTHER; `en` without letters."""
    text = text[:LOOK_AT]
    return "en" if text.isascii() else most(letters(text))
