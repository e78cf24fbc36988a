"""Which answers are not worth learning from: cut off, looping, empty, out of range, in the wrong language.

A draft head that learns from loops proposes loops, and small or sampled models do loop. Every rule looks at
one sample alone and gives its name as the reason, which `curate` counts and shows. The rules are plain and
their thresholds are in the recipe; with the defaults they drop about 1 in 1,200 reference answers of Alpaca,
GSM8K and code instructions, half of those Chinese prompts answered with little but code or English names.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from fastmtp.vocab.lang import detect

# A word is a run of letters and digits, or one Chinese character: Chinese is written without spaces.
WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
# Lines with a sign of code or formulas; answers in code are English by script whatever language they were
# asked in.
CODE_LINE = re.compile(
    r"^.*(?:[#{}<>=_\\|^@$]|;\s*$|\w\(|https?:|^\s*(?:def|class|import|from|SELECT)\b).*$", re.MULTILINE
)
REASONS = {
    "empty": "an answer without any text",
    "truncated": "generation stopped at the token limit, not at the end of the answer",
    "unfinished_think": "a <think> block that never closes",
    "too_short": "fewer answer tokens than clean.min_tokens",
    "too_long": "more answer tokens than clean.max_tokens, or a chat longer than clean.max_total_tokens",
    "loop": "the same words over and over, back to back",
    "repeated_lines": "mostly lines that were already there",
    "repeated_ngrams": "mostly word sequences that were already there",
    "wrong_language": "an answer in another language than its prompt",
}


@dataclass
class CleanConfig:
    """Thresholds of the rules; the recipe's `clean:` section."""

    drop_truncated: bool = True  # answers cut at the token limit; kept ones get an end of turn they never had
    min_tokens: int = 2  # tokens of all answers together, end of turn included
    max_tokens: int = 16384
    max_total_tokens: int = 32768  # prompt and answers: what the trainer has to fit
    loop_repeats: int = 6  # a unit of up to `loop_period` words, this often back to back ...
    loop_words: int = 24  # ... and covering at least this many words, is a loop
    loop_period: int = 64
    repeated_lines: float = (
        0.4  # share of the words in lines of three words or more seen before in the answer
    )
    repeated_ngrams: float = 0.5  # share of the words inside 8-word sequences seen before in the answer
    languages: list[str] = field(
        default_factory=lambda: ["en", "zh"]
    )  # check samples of these; [] checks none


def words(text: str) -> list[str]:
    """Lower-case words of a text, punctuation and spacing ignored."""
    return WORD.findall(text.lower())


def verdict(
    answers: list[str], finish: str, lang: str, tokens: int, total: int, config: CleanConfig
) -> str | None:
    """Why a sample is dropped (a key of REASONS), or None when it is clean.

    `answers` are the texts of its assistant turns, `tokens` their token count, `total` that of the whole
    chat.
    """
    if any(not visible(answer) for answer in answers):
        return "unfinished_think" if any(unfinished_think(answer) for answer in answers) else "empty"
    if finish == "length" and config.drop_truncated:
        return "truncated"
    if any(unfinished_think(answer) for answer in answers):
        return "unfinished_think"
    if tokens < config.min_tokens:
        return "too_short"
    if tokens > config.max_tokens or total > config.max_total_tokens:
        return "too_long"
    for answer in answers:
        if reason := repetition(answer, config):
            return reason
    if lang in config.languages and wrong_language("\n".join(answers), lang):
        return "wrong_language"
    return None


def visible(answer: str) -> str:
    """The answer after its thinking; the whole of it when there is none."""
    return answer.rpartition("</think>")[2].strip() if "</think>" in answer else answer.strip()


def unfinished_think(answer: str) -> bool:
    """True when thinking was opened last and not closed. A lone `</think>` is fine: templates may open it
    themselves.
    """
    return answer.rfind("<think>") > answer.rfind("</think>")


def wrong_language(text: str, lang: str) -> bool:
    """True if the prose of `text` is in another language; code is no prose, and a few letters prove
    nothing.

    Names and terms in Latin script outnumber the rest in many a good Chinese answer, so a fifth of the words
    is enough.
    """
    prose = CODE_LINE.sub(" ", CODE.sub(" ", text))
    prose_words = words(prose)
    if len(prose_words) < 20 or detect(prose) == lang:
        return False
    return sum(detect(word) == lang for word in prose_words) < len(prose_words) / 5


def repetition(answer: str, config: CleanConfig) -> str | None:
    """`loop`, `repeated_lines`, `repeated_ngrams` or None."""
    vocabulary: dict[str, int] = {}
    sequence = np.array([vocabulary.setdefault(w, len(vocabulary)) for w in words(answer)], dtype=np.int64)
    if len(sequence) < config.loop_words:
        return None
    if _loops(sequence, config):
        return "loop"
    if _repeated_line_share(answer) > config.repeated_lines:
        return "repeated_lines"
    return "repeated_ngrams" if _repeated_share(sequence, 8) > config.repeated_ngrams else None


def _loops(sequence: np.ndarray, config: CleanConfig) -> bool:
    """A unit of p words repeated r times: (r - 1) p positions in a row equal the one p further on."""
    for period in range(1, min(config.loop_period, len(sequence) // 2) + 1):
        needed = max((config.loop_repeats - 1) * period, config.loop_words - period)
        if needed > len(sequence) - period:
            continue
        differs = np.flatnonzero(sequence[period:] != sequence[:-period])
        edges = np.concatenate(([-1], differs, [len(sequence) - period]))
        if np.diff(edges).max() - 1 >= needed:
            return True
    return False


def _repeated_line_share(answer: str) -> float:
    lines = Counter(line.strip() for line in answer.splitlines())
    sized = [(len(words(line)), count) for line, count in lines.items() if line]
    total = sum(size * count for size, count in sized)
    return sum(size * (count - 1) for size, count in sized if size >= 3) / max(total, 1)


def _repeated_share(sequence: np.ndarray, n: int) -> float:
    """Share of positions covered by an n-gram that has occurred before."""
    windows = (
        np.lib.stride_tricks.sliding_window_view(sequence, n) if len(sequence) >= n else np.empty((0, n))
    )
    if not len(windows):
        return 0.0
    keys = windows @ (
        np.int64(1000003) ** np.arange(n, dtype=np.int64)
    )  # wraps around: a hash, equal for equal windows
    first = np.zeros(len(keys), dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    covered = np.zeros(len(sequence), dtype=bool)
    for offset in range(n):
        covered[offset : offset + len(keys)] |= ~first
    return float(covered.mean())
