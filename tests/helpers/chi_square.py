"""Pearson's chi-square test."""

import pytest
import torch


def p_value(statistic: torch.Tensor, freedom: int) -> float:
    """Upper tail of the chi-square distribution."""
    return float(
        torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.as_tensor(statistic).double() / 2)
    )


def assert_fits(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Pearson's test at one in ten thousand; cells below five expected draws are pooled."""
    counts, expected = counts.flatten().double(), expected.flatten().double()
    assert counts.sum().item() == pytest.approx(expected.sum().item(), rel=1e-4)
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        if expected[-1] < 5:
            counts, expected = counts[:-1], expected[:-1]
    expected = expected * (counts.sum() / expected.sum())
    assert p_value(((counts - expected) ** 2 / expected).sum(), len(counts) - 1) > 1e-4
