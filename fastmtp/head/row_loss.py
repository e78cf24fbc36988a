"""What losses need of rows of logits, each in one pass over memory on a GPU: normaliser and argmax, then the
softmax in place.

In plain torch the same takes a float32 copy of the logits and about ten passes, which at a vocabulary of
150,000 costs as much as the product that made them. Without a GPU, plain torch does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA
    triton = None

BLOCK = 8192

if triton is not None:

    @triton.jit
    def _normalise(logits, normalisers, best, stride, width: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        top = float("-inf")
        total = 0.0
        winner = 0
        for start in range(0, width, BLOCK):
            at = start + lanes
            x = tl.load(logits + row * stride + at, mask=at < width, other=float("-inf")).to(tl.float32)
            highest, where = tl.max(x, 0, return_indices=True)
            winner = tl.where(highest > top, start + where, winner)
            higher = tl.maximum(top, highest)
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        tl.store(normalisers + row, top + tl.log(total))
        tl.store(best + row, winner.to(tl.int64))

    @triton.jit
    def _softmax(logits, normalisers, scales, stride, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        x = tl.load(logits + row * stride + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.exp(x - tl.load(normalisers + row)) * tl.load(scales + row)
        tl.store(logits + row * stride + at, y.to(logits.dtype.element_ty), mask=inside)


def on_kernels(logits: Tensor) -> bool:
    return triton is not None and logits.is_cuda


def normalise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log-sum-exp [N] float32, argmax [N] int64) of logits [N, V], rows contiguous."""
    if not on_kernels(logits):
        logits = logits.float()  # argmax of bfloat16 takes four times as long on a CPU
        return logits.logsumexp(-1), logits.argmax(-1)
    count, width = logits.shape
    normalisers = torch.empty(count, dtype=torch.float32, device=logits.device)
    best = torch.empty(count, dtype=torch.int64, device=logits.device)
    _normalise[(count,)](logits, normalisers, best, logits.stride(0), width, BLOCK, num_warps=8)
    return normalisers, best


def scaled_softmax(logits: Tensor, normalisers: Tensor, scales: Tensor) -> Tensor:
    """e^(logits - normaliser) * scale, row by row, in the dtype of `logits` [N, V]. A GPU overwrites them.

    normalisers (of `normalise`), scales: [N] float32, contiguous.
    """
    if not on_kernels(logits):
        return logits.softmax(-1).mul_(scales[:, None].to(logits.dtype))
    count, width = logits.shape
    _softmax[(count, triton.cdiv(width, BLOCK))](
        logits, normalisers, scales, logits.stride(0), width, BLOCK, num_warps=8
    )
    return logits
