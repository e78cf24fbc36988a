"""Do two samples of answers come from one distribution? Chi-square tests of their tokens and neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from scipy.stats import chi2_contingency

RARE = 10  # outcomes seen less often in both samples together share a column
ALPHA = 2e-4  # a p below it is a difference: fifty tests of equal distributions give one in 1 % of runs


@dataclass
class Test:
    """A chi-square test of two samples. p: the chance of samples that differ as much if both come from one
    distribution; outcomes: how many different ones were seen.
    """

    tokens: str
    statistic: float
    freedom: int
    p: float
    outcomes: int


def compare(one: Sequence[Hashable], other: Sequence[Hashable], tokens: str = "") -> Test:
    """Test two samples of outcomes; `tokens` names them."""
    first, second = Counter(one), Counter(other)
    counts = [(first[outcome], second[outcome]) for outcome in first.keys() | second.keys()]
    table = [pair for pair in counts if sum(pair) >= RARE]
    rest = [pair for pair in counts if sum(pair) < RARE]
    if rest:
        table.append((sum(a for a, _ in rest), sum(b for _, b in rest)))
    if len(table) < 2:
        return Test(tokens, 0.0, 0, 1.0, len(counts))
    result = chi2_contingency(list(zip(*table, strict=True)))
    return Test(tokens, float(result.statistic), int(result.dof), float(result.pvalue), len(counts))


def compare_answers(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> list[Test]:
    """Test each token of answers of one length, and each token together with the next.

    Pairs see what single tokens do not: a token that is right on average but does not fit the one before it.
    """
    length = len(one[0])
    spans = [(first, first + 1) for first in range(length)]
    spans += [(first, first + 2) for first in range(length - 1)]
    tests = []
    for first, end in spans:
        samples = [[tuple(answer[first:end]) for answer in answers] for answers in (one, other)]
        name = str(first + 1) if end == first + 1 else f"{first + 1} and {end}"
        tests.append(compare(*samples, name))
    return tests
