"""The best few ids of a softmax in two Triton kernels, for a draft tree's steps in SGLang.

torch.softmax and torch.topk read and write the whole vocabulary several times; here it is read once. Letters:
R rows, V ids, K best ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without a GPU brings no Triton
    triton = None

CHUNK = 4096  # ids per program

if triton is not None:

    @triton.jit
    def _parts(
        logits, highest, sums, values, ids, row_width, V: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr
    ):
        row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        place = tl.arange(0, CHUNK)
        column = part * CHUNK + place
        x = tl.load(logits + row * row_width + column, mask=column < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(tl.max(x, axis=0), -1e30)
        at = row * parts + part
        tl.store(highest + at, top)
        tl.store(sums + at, tl.sum(tl.exp(x - top), axis=0))
        for k in tl.static_range(K):
            best = tl.argmax(x, axis=0)
            tl.store(values + at * K + k, tl.max(x, axis=0))
            tl.store(ids + at * K + k, tl.minimum(part * CHUNK + best, V - 1))  # in range even for NaN
            x = tl.where(place == best, float("-inf"), x)

    @triton.jit
    def _whole(
        highest,
        sums,
        values,
        ids,
        probabilities,
        best_ids,
        parts,
        K: tl.constexpr,
        PARTS: tl.constexpr,
        CANDIDATES: tl.constexpr,
    ):
        row = tl.program_id(0)
        part = tl.arange(0, PARTS)
        tops = tl.load(highest + row * parts + part, mask=part < parts, other=float("-inf"))
        top = tl.max(tops, axis=0)
        total = tl.load(sums + row * parts + part, mask=part < parts, other=0.0) * tl.exp(tops - top)
        total = tl.sum(total, axis=0)
        place, count = tl.arange(0, CANDIDATES), parts * K
        x = tl.load(values + row * count + place, mask=place < count, other=float("-inf"))
        for k in tl.static_range(K):
            best = tl.minimum(tl.argmax(x, axis=0), count - 1)
            tl.store(probabilities + row * K + k, tl.exp(tl.max(x, axis=0) - top) / total)
            tl.store(best_ids + row * K + k, tl.load(ids + row * count + best).to(tl.int64))
            x = tl.where(place == best, float("-inf"), x)


def softmax_top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Probabilities [R, K] float32 and ids [R, K] of the `count` best of logits [R, V], best first."""
    rows, width = logits.shape
    parts = triton.cdiv(width, CHUNK)
    numbers = {"dtype": torch.float32, "device": logits.device}
    highest, sums = torch.empty(2, rows, parts, **numbers)
    values = torch.empty(rows, parts, count, **numbers)
    ids = torch.empty(rows, parts, count, dtype=torch.int32, device=logits.device)
    _parts[rows, parts](
        logits, highest, sums, values, ids, logits.stride(0), V=width, K=count, CHUNK=CHUNK, num_warps=8
    )
    probabilities = torch.empty(rows, count, **numbers)
    best = torch.empty(rows, count, dtype=torch.int64, device=logits.device)
    _whole[(rows,)](
        highest,
        sums,
        values,
        ids,
        probabilities,
        best,
        parts,
        K=count,
        PARTS=triton.next_power_of_2(parts),
        CANDIDATES=triton.next_power_of_2(parts * count),
        num_warps=1,
    )
    return probabilities, best
