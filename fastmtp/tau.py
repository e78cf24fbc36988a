"""Accept length (tau): counts of verify passes, rates by draft position, intervals, and the walk over an
answer.

tau is the number of output tokens per verify pass. A pass keeps its accepted drafts and one token of the
backbone's own, so histogram[j], the number of passes with exactly j accepted drafts, says everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

RESAMPLES = 1000


def accept_length(output_tokens: int, verify_passes: int) -> float | None:
    """tau: output tokens per verify pass. None if nothing was verified: unknown, not 1."""
    return output_tokens / verify_passes if verify_passes else None


def position_rates(histogram: Sequence[int]) -> list[float] | None:
    """rates[i] = share of verify passes whose draft i+1 was accepted, from counts of accepted drafts per
    pass. None if nothing was verified: unknown, not 0.
    """
    passes = sum(histogram)
    return [sum(histogram[i + 1 :]) / passes for i in range(len(histogram) - 1)] if passes else None


@dataclass
class Acceptance:
    """Pooled counts. histogram[j]: verify passes with exactly j accepted drafts; samples: (output tokens,
    verify passes) of each answer, in the order of the data.
    """

    output_tokens: int = 0
    histogram: list[int] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def over(cls, answers: Sequence[Sequence[int]], histograms: Sequence[list[int]]) -> Acceptance:
        """Of answers' token ids and their histograms."""
        total = cls()
        for ids, histogram in zip(answers, histograms, strict=True):
            total.add(len(ids), histogram)
        return total

    def add(self, output_tokens: int, histogram: list[int]) -> None:
        self._count(output_tokens, histogram)
        self.samples.append((output_tokens, sum(histogram)))

    def merge(self, other: Acceptance) -> None:
        self._count(other.output_tokens, other.histogram)
        self.samples += other.samples

    def _count(self, output_tokens: int, histogram: list[int]) -> None:
        self.output_tokens += output_tokens
        self.histogram = [
            a + b for a, b in zip(self.histogram or [0] * len(histogram), histogram, strict=True)
        ]

    @property
    def verify_passes(self) -> int:
        return sum(self.histogram)

    @property
    def accept_length(self) -> float | None:
        return accept_length(self.output_tokens, self.verify_passes)

    @property
    def position_rates(self) -> list[float] | None:
        return position_rates(self.histogram)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % bootstrap interval of tau over answers; None if nothing was verified."""
        return bounds(bootstrap(self.samples))


def resample(samples: Sequence[Sequence[float]], draws: int = RESAMPLES) -> Tensor:
    """Sums [draws, C] of the C columns of `samples`, over len(samples) rows drawn with replacement; float64.

    The draws depend on the number of rows alone, so those of two arms on the same answers are paired: the
    interval of their ratio is that of the gain.
    """
    columns = torch.tensor(samples, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    sums = torch.empty(draws, columns.shape[1], dtype=torch.float64)
    for i in range(draws):
        sums[i] = columns[torch.randint(len(columns), (len(columns),), generator=generator)].sum(0)
    return sums


def bootstrap(samples: Sequence[tuple[int, int]]) -> Tensor:
    """tau of RESAMPLES draws of the answers in `samples` (output tokens, verify passes), float64
    [RESAMPLES]. A draw in which nothing was verified is NaN, which `bounds` leaves out.
    """
    tokens, passes = resample(samples).T if len(samples) else torch.zeros(2, 0, dtype=torch.float64)
    return torch.where(passes > 0, tokens / passes, torch.nan)


def bounds(draws: Tensor) -> tuple[float, float] | None:
    """The middle 95 % of the draws that are numbers; None if there is none."""
    draws = draws[draws.isfinite()]
    if not len(draws):
        return None
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high


def ratio(part: Acceptance, reference: Acceptance) -> tuple[float, float, float] | None:
    """tau over that of the reference on the same answers in the same order, and its paired 95 % interval.
    None if either verified nothing. Raises ValueError if the numbers of answers differ.
    """
    if len(part.samples) != len(reference.samples):
        raise ValueError(f"{len(part.samples)} and {len(reference.samples)} answers cannot be paired")
    if not (part.verify_passes and reference.verify_passes):
        return None
    low, high = bounds(bootstrap(part.samples) / bootstrap(reference.samples))
    return part.accept_length / reference.accept_length, low, high


def walk(hits: Tensor) -> list[int]:
    """Histogram of accepted drafts of one answer. hits: [n-1, K] bool, row i: the anchor whose next token is
    answer token i; hits[i, k] says that draft k+1 equals answer token i+k+1 (False past the end). n: answer
    tokens.

    The first answer token comes from the prefill; each pass then keeps its accepted drafts and one more
    token.
    """
    return stride(hits.long().cumprod(1).sum(1).tolist(), hits.shape[1])


def stride(drafts: Sequence[int], depth: int) -> list[int]:
    """`walk` from the number of drafts, at most `depth`, that each anchor would accept."""
    histogram = [0] * (depth + 1)
    anchor, remaining = 0, len(drafts)
    while remaining > 0:
        accepted = min(drafts[anchor], remaining)
        histogram[accepted] += 1
        anchor += accepted + 1
        remaining -= accepted + 1
    return histogram


def summarise(rows: list[dict]) -> dict:
    """Pooled figures over decoded rows: tau, rates, seconds, speed-up and identity. What is
    unknown, because nothing was drafted, is None.
    """
    histogram = [sum(column) for column in zip(*(row["histogram"] for row in rows), strict=True)]
    tokens, passes = sum(len(row["output_ids"]) for row in rows), sum(row["verify_passes"] for row in rows)
    plain_s, draft_s = sum(row["plain_s"] for row in rows), sum(row["draft_s"] for row in rows)
    return {
        "questions": len(rows),
        "output_tokens": tokens,
        "accept_length": accept_length(tokens, passes),
        "position_rates": position_rates(histogram),
        "histogram": histogram,
        "plain_s": plain_s,
        "draft_s": draft_s,
        "speedup": plain_s / draft_s if passes and draft_s else None,
        "identical": sum(row["identical"] for row in rows),
    }
