"""The language of token ids without decoding them: one table per tokenizer, made once, asked at every
request.

Each id has a script (as in lang.py) and a weight, about how much of a token of that language it is. A text of
64 ids is then one weighted count, a few microseconds on the host. Byte-level tokenizers split rare characters
over several tokens; the first byte of such a character still tells its script.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmtp.vocab.lang import LANGUAGES, OTHER, letters, most

WINDOW = 64  # ids that are looked at: about fifty English words
ENOUGH = (
    2.5  # tokens' worth of letters below which nothing is said: "assistant" alone, the head of a turn, is 1.8
)
KINDS = (*LANGUAGES, OTHER)
SPECIAL = 255

# First bytes of UTF-8 characters, if a token ends in the middle of one. Bytes that two scripts share, of
# which none has most of the letters, say nothing (CA to CD, D4, DD, E1, E2).
_FIRST_BYTES = {
    **dict.fromkeys(map(bytes, zip(range(0xC3, 0xCA))), "en"),
    **dict.fromkeys((b"\xce", b"\xcf"), "el"),
    **dict.fromkeys(map(bytes, zip(range(0xD0, 0xD4))), "ru"),
    **dict.fromkeys((b"\xd6", b"\xd7"), "he"),
    **dict.fromkeys(map(bytes, zip(range(0xD8, 0xDC))), "ar"),
    **dict.fromkeys((b"\xd5", b"\xdc", b"\xde", b"\xdf", b"\xe0"), OTHER),
    b"\xe3": "ja",
    **dict.fromkeys(map(bytes, zip(range(0xE4, 0xEA))), "zh"),
    **dict.fromkeys(map(bytes, zip(range(0xEA, 0xEE))), "ko"),
}


def _first_bytes(start: bytes) -> str | None:
    """The language of a character's first byte or two (of three)."""
    if len(start) == 2 and start[0] in (0xE0, 0xE1, 0xE2):
        # Any character of the 64 that begin so: blocks are larger than that.
        said = letters("".join((start + bytes([last])).decode(errors="ignore") for last in range(0x80, 0xC0)))
        return most(said) if any(said.values()) else None
    return _FIRST_BYTES.get(start[:1])


@dataclass
class ScriptTable:
    """kind: [V] uint8, index into KINDS or SPECIAL; weight: [V] float32, 0 for ids without letters."""

    kind: np.ndarray
    weight: np.ndarray

    def language(self, ids: Sequence[int]) -> str | None:
        """Of the last 64 ids; None if they have too few letters to tell. Ids outside the table say
        nothing.
        """
        last = np.asarray(ids[-WINDOW:], dtype=np.int64)
        last = last[(last >= 0) & (last < len(self.kind))]
        weight = self.weight[last]
        lettered = weight > 0
        if weight.sum() < ENOUGH:
            return None
        said = np.bincount(self.kind[last[lettered]], weights=weight[lettered], minlength=len(KINDS))
        return most(dict(zip(KINDS, said.tolist(), strict=True)))

    def prompt_language(self, ids: Sequence[int]) -> str | None:
        """Of the last turn that says enough: turns lie between special ids, and an English system text says
        little about a Chinese question.
        """
        known = np.asarray(ids, dtype=np.int64)
        inside = (known >= 0) & (known < len(self.kind))
        cuts = np.flatnonzero(inside & (self.kind[np.where(inside, known, 0)] == SPECIAL))
        for turn in reversed(np.split(known, cuts)):
            if (lang := self.language(turn)) is not None:
                return lang
        return None


def build(tokenizer) -> ScriptTable:
    """The table of a fast tokenizer (a second or two for 150,000 tokens)."""
    vocab = tokenizer.get_vocab()
    size = max(vocab.values()) + 1
    kind, weight = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.float32)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    bytes_of = (
        _byte_level if "ByteLevel" in json.dumps([pipeline["pre_tokenizer"], pipeline["decoder"]]) else _plain
    )
    for token, i in vocab.items():
        if i in special:
            kind[i] = SPECIAL
            continue
        said = _said(bytes_of(token))
        lang = most(said)
        kind[i], weight[i] = KINDS.index(lang), said[lang]
    return ScriptTable(kind, weight)


def _said(token: bytes) -> dict[str, float]:
    """letters() of a token's whole characters, and half a token for each character whose first byte alone is
    in it.
    """
    said = letters(token.decode("utf-8", errors="ignore"))
    for start in re.findall(rb"[\xc3-\xed](?![\x80-\xbf])|[\xe0-\xed][\x80-\xbf](?![\x80-\xbf])", token):
        if lang := _first_bytes(start):
            said[lang] += 0.5
    return said


def _byte_level(token: str) -> bytes:
    return bytes(_BYTES[c] for c in token if c in _BYTES)


def _plain(token: str) -> bytes:
    """Sentencepiece: text with a mark for spaces, or one byte written as <0xE4>."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character: printable Latin-1 as itself, the rest from
    U+0100 on.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
