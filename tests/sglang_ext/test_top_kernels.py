"""The best ids of a softmax against plain torch, on a GPU or with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from fastmtp.sglang_ext import top_kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    top_kernels.triton is None or not (GPU or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="Triton on a GPU, or TRITON_INTERPRET=1",
)


def same_as_torch(logits, count):
    probabilities, ids = top_kernels.softmax_top(logits, count)
    expected, best = torch.softmax(logits.float(), -1).topk(count)
    assert ids.dtype == torch.int64 and ids.tolist() == best.tolist()
    assert torch.allclose(probabilities, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("rows", "width", "count"), [(1, 7, 4), (4, 4096, 4), (3, 9001, 2), (4, 33000, 8)])
def test_probabilities_and_ids(rows, width, count):
    torch.manual_seed(0)
    same_as_torch(torch.randn(rows, width, device=DEVICE) * 4, count)


def test_rows_apart_and_ids_outside_a_map():
    torch.manual_seed(0)
    logits = torch.full((4, 20_000), torch.finfo(torch.float32).min, device=DEVICE)[:, :15_000]
    logits[:, 4090:4100] = torch.randn(4, 10, device=DEVICE)  # across two programs, nothing anywhere else
    same_as_torch(logits, 4)


def test_ids_stay_in_range_for_nan():
    logits = torch.full((2, 5000), float("nan"), device=DEVICE)
    _, ids = top_kernels.softmax_top(logits, 4)
    assert ids.min() >= 0 and ids.max() < 5000
