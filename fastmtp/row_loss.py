"""Cross-entropy of rows of logits and its gradient in their place: one Triton kernel, three passes over memory.

In plain torch the same takes a float32 copy of the logits and about ten passes, which at a vocabulary of 150,000 costs
as much as the product that made them. Needs a GPU and Triton, which torch brings along there.
"""

from __future__ import annotations

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA
    triton = None

BLOCK = 8192


def kernel_usable(x: Tensor) -> bool:
    return triton is not None and x.is_cuda


if triton is not None:

    @triton.jit
    def _kernel(logits, targets, losses, stride, width: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        target = tl.load(targets + row)
        lanes = tl.arange(0, BLOCK)
        top = float("-inf")
        total = 0.0
        wanted = 0.0
        for start in range(0, width, BLOCK):
            at = start + lanes
            x = tl.load(logits + at, mask=at < width, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
            wanted += tl.sum(tl.where(at == target, x, 0.0), 0)
        normaliser = top + tl.log(total)
        tl.store(losses + row, normaliser - wanted)
        for start in range(0, width, BLOCK):
            at = start + lanes
            x = tl.load(logits + at, mask=at < width, other=float("-inf")).to(tl.float32)
            residual = tl.exp(x - normaliser) - tl.where(at == target, 1.0, 0.0)
            tl.store(logits + at, residual.to(logits.dtype.element_ty), mask=at < width)


def loss_and_residual(logits: Tensor, targets: Tensor, losses: Tensor) -> None:
    """losses[i] = cross-entropy of row i; `logits` [N, V] becomes softmax - one-hot, the gradient, in its own dtype.

    logits: contiguous rows of any float type; targets: [N] int64; losses: [N] float32, written.
    """
    _kernel[(logits.shape[0],)](logits, targets, losses, logits.stride(0), logits.shape[1], BLOCK, num_warps=8)
