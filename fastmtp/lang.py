"""Which language a text is in, told by its script alone: fast, and enough to catch an answer in the wrong one."""

from __future__ import annotations

import re

SCRIPTS = {
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"),
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "ko": re.compile(r"[\uac00-\ud7af]"),
    "ru": re.compile(r"[\u0400-\u04ff]"),
    "en": re.compile(r"[A-Za-z]{2,}"),
}


def detect_language(text: str) -> str:
    """'zh', 'ja', 'ko', 'ru', 'en' (any Latin text), or 'other' where no letter is found.

    A Latin word counts as one, like a Chinese character, so that English terms do not outvote the Chinese around them.
    """
    counts = {name: len(pattern.findall(text)) for name, pattern in SCRIPTS.items()}
    if counts["ja"] * 10 > counts["zh"] + counts["ja"]:
        counts["ja"] += counts["zh"]
    best = max(counts, key=counts.get)
    return best if counts[best] else "other"
