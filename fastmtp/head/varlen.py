"""Causal attention over packed documents by the flash kernels in torch, and its merge with a few keys of
one's own.

Tokens of a batch lie in one row, document after document; `Documents` says where each starts, so nothing of
size T x T exists. For `exact` attention (recursion.py) each query sees, besides the step-1 keys of its
document, its own keys of steps 2..k. A softmax over both parts is the two softmaxes weighted by their
log-sum-exp:

    lse = logaddexp(lse_flash, s_2, ..., s_k)      out = e^(lse_flash - lse) out_flash + sum_s e^(s - lse) v_s

Backward, the flash kernel is called with the merged `out` and `lse`: it needs P = e^(S - lse) and dO . O
alone, so its gradients are then those of the joint softmax; the few own scores have theirs written out.
Imports torch alone, and FlashAttention 4 if `use_flash_attn` is told to.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

_flash_attn: ModuleType | None = None  # flash_attn.cute.interface; None: the kernels that torch carries


class Documents(NamedTuple):
    """starts: [N + 1] int32, the first row of each document and the end; longest: tokens of the longest."""

    starts: Tensor
    longest: int


def documents(segments: Tensor) -> Documents:
    """The runs of equal numbers in each row of `segments` [B, T]; a run of padding counts as a document."""
    flat = segments.flatten()
    new = torch.ones_like(flat, dtype=torch.bool)
    new[1:] = flat[1:] != flat[:-1]
    new[:: segments.shape[1]] = True
    starts = torch.cat([new.nonzero().squeeze(1), torch.tensor([len(flat)], device=flat.device)]).to(
        torch.int32
    )
    return Documents(starts, int(starts.diff().max()))


def flash_usable(x: Tensor) -> bool:
    """Whether the flash kernels take tensors like x; otherwise recursion.py's dense form does the same."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def load_flash_attn() -> ModuleType:
    """FlashAttention 4's functions. Raises ImportError without the package, and what its compiler raises."""
    # by name: transformers wants every import of a checkpoint's code installed
    return importlib.import_module("flash_attn.cute.interface")


def use_flash_attn(on: bool) -> None:
    """Packed attention of this process goes through FlashAttention 4 (flash-attn-4) from now on, or through
    torch's kernels again, which are FlashAttention 2.

    Raises ImportError without the package, RuntimeError on a GPU that it cannot train on.
    """
    global _flash_attn
    if not on:
        _flash_attn = None
        return
    interface = load_flash_attn()
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
        raise RuntimeError("flash-attn-4 trains on Hopper and later GPUs only; set mtp_flash_attn: false")
    _flash_attn = interface


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, where: Documents
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Causal attention in each document. q: [N, Hq, D]; k, v: [N, Hkv, D]; returns out [N, Hq, D], lse [Hq,
    N] float32 and the two random states that torch's backward asks for (None from flash-attn).
    """
    if _flash_attn is not None:
        out, lse, *_ = _flash_attn._flash_attn_fwd(q, k, v, **_documents(q, where), return_lse=True)
        return out, lse, None, None
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        where.starts,
        where.starts,
        where.longest,
        where.longest,
        0.0,
        True,
        False,
        scale=q.shape[-1] ** -0.5,
    )
    return out, lse, seed, offset


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    offset: Tensor | None,
    where: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v for P = e^(S - lse), whatever `lse` and `out` are."""
    if _flash_attn is not None:
        dq, dk, dv, *_ = _flash_attn._flash_attn_bwd(q, k, v, out, grad, lse, **_documents(q, where))
        return dq, dk, dv
    at, longest = where
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, at, at, longest, longest, 0.0, True, seed, offset, scale=q.shape[-1] ** -0.5
    )


def _documents(q: Tensor, where: Documents) -> dict:
    """What both kernels of flash-attn take beside the tensors."""
    starts, longest = where
    lengths = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest)
    return lengths | dict(softmax_scale=q.shape[-1] ** -0.5, causal=True)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[N, Hq, ...] -> [N, Hkv, Hq / Hkv, ...]."""
    return x.unflatten(1, (groups, -1))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Attention(torch.autograd.Function):
    """`own` is k_2, v_2, ..., k_S, v_S, each [N, Hkv, D]; without them it is plain causal attention."""

    @staticmethod
    def forward(ctx, where: Documents, q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        out, lse, seed, offset = flash_forward(q, k, v, where)
        weights = None
        if own:
            groups, query = k.shape[1], _wide(_grouped(q, k.shape[1])) * q.shape[-1] ** -0.5
            scores = torch.stack(
                [lse.t(), *((query * key[:, :, None]).sum(-1).flatten(1) for key in own[::2])]
            )
            normaliser = scores.logsumexp(0)
            weights = (scores - normaliser).exp()  # [S, N, Hq]
            merged = _grouped(out * weights[0, :, :, None], groups)
            for weight, value in zip(weights[1:], own[1::2], strict=True):
                merged += _grouped(weight, groups)[..., None] * value[:, :, None]
            out, lse = merged.flatten(1, 2).to(q.dtype), normaliser.t().contiguous()
        ctx.save_for_backward(where.starts, q, k, v, out, lse, seed, offset, weights, *own)
        ctx.longest = where.longest
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        starts, q, k, v, out, lse, seed, offset, weights, *own = ctx.saved_tensors
        where = Documents(starts, ctx.longest)
        grad = grad.contiguous()
        dq, dk, dv = flash_backward(grad, q, k, v, out, lse, seed, offset, where)
        gradients = []
        if own:
            groups, scale = k.shape[1], q.shape[-1] ** -0.5
            up, query, dq = (_wide(_grouped(x, groups)) for x in (grad, q, dq))
            delta = (up * _grouped(out, groups)).sum(-1, keepdim=True)
            for weight, key, value in zip(weights[1:], own[::2], own[1::2], strict=True):
                share = _grouped(weight, groups)[..., None]
                slope = share * ((up * value[:, :, None]).sum(-1, keepdim=True) - delta) * scale
                dq += slope * key[:, :, None]
                gradients += [(slope * query).sum(2).to(key.dtype), (share * up).sum(2).to(value.dtype)]
            dq = dq.flatten(1, 2).to(q.dtype)
        return None, dq, dk, dv, *gradients


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, own: list[tuple[Tensor, Tensor]], where: Documents
) -> Tensor:
    """One softmax over [keys j <= i of the query's document ; its own keys], differentiable.

    q: [B, Hq, T, D]; k, v and each (k, v) of `own`: [B, Hkv, T, D], bfloat16 or float16 on a GPU; `where` of
    the B * T tokens in a row. Returns [B, Hq, T, D].
    """
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, *(x for pair in own for x in pair))]
    plain = (
        not own and not torch.is_grad_enabled()
    )  # nothing but the kernel, so that torch.compile takes it whole
    context = flash_forward(*rows, where)[0] if plain else _Attention.apply(where, *rows)
    return context.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
