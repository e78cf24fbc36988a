"""One answered request, as every backend reports it and as the answer files keep it."""

from __future__ import annotations

from dataclasses import dataclass


class BackendError(Exception):
    """The server or decoder failed or answered nonsense. One line; answers already finished are kept."""


@dataclass
class Turn:
    """One request's answer. Seconds are the client's clock.

    output_ids: end token included. verify_passes, histogram: None and [] without speculation; `histogram[j]` counts
    the verify passes with exactly j accepted drafts. first_tokens: tokens that came with the first chunk, first_s:
    when it came; so (tokens - first_tokens) / (latency_s - first_s) is decoding alone.
    """

    output_ids: list[int]
    text: str
    prompt_tokens: int
    verify_passes: int | None
    histogram: list[int]
    first_tokens: int
    first_s: float
    latency_s: float
    started: float
    finish: str
