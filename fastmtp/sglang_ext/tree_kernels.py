"""Two Triton kernels for the verification of a draft tree in SGLang; without Triton the import still works.

Letters: B requests, N nodes of a tree with its root, H query heads, G query heads per key head, D width of a
head. Slots are rows of the key-value cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without a GPU brings no Triton
    triton = None

PAGES = 2048  # pages of the prefix that one program copies

if triton is not None:

    @triton.jit(do_not_specialize=["live"])
    def _metadata(
        seq_lens,
        requests,
        req_to_token,
        mask,
        prefix_lens,
        prefix_starts,
        prefix_pages,
        tree_slots,
        tree_lens,
        live,
        row_width: tl.constexpr,
        prefix_width: tl.constexpr,
        tree_width: tl.constexpr,
        page_size: tl.constexpr,
        N: tl.constexpr,
        SIDE: tl.constexpr,
        BATCH: tl.constexpr,
        PAGES: tl.constexpr,
    ):
        b, part = tl.program_id(0), tl.program_id(1)
        length = tl.load(seq_lens + b).to(tl.int64)
        row = req_to_token + tl.load(requests + b).to(tl.int64) * row_width
        if part > 0:  # the prefix's pages; Triton wants other names in the other branch
            page = (part - 1) * PAGES + tl.arange(0, PAGES)
            used = page < tl.cdiv(length, page_size)
            first = tl.load(row + page.to(tl.int64) * page_size, mask=used, other=0)
            tl.store(prefix_pages + b * prefix_width + page, first // page_size, mask=used)
        else:  # the prefix's length, and for each node the slots that it sees, in order, then the others
            others = tl.arange(0, BATCH)
            before = tl.sum(tl.load(seq_lens + others, mask=others < b, other=0).to(tl.int64))
            tl.store(prefix_lens + b, length.to(tl.int32))
            tl.store(prefix_starts + b + 1, (before + length).to(tl.int32))
            node, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
            inside = (node < N) & (column < N)
            cell = (before + b * N) * N + node * (length + N) + length + column
            cell = tl.where(b < live, cell, 0)  # padding sees what the mask's first cell says
            seen = (tl.load(mask + cell, mask=inside, other=0) != 0).to(tl.int32)
            hidden = inside.to(tl.int32) - seen
            count = tl.sum(seen, axis=1)
            place = tl.where(
                seen != 0,
                tl.cumsum(seen, axis=1) - seen,
                count[:, None] + tl.cumsum(hidden, axis=1) - hidden,
            )
            slot = tl.load(row + length + column, mask=column < N, other=0)
            target = tree_slots + (b * N + node) * tree_width + place
            tl.store(target, tl.broadcast_to(slot, (SIDE, SIDE)), mask=inside)
            lines = tl.arange(0, SIDE)
            tl.store(tree_lens + b * N + lines, count, mask=lines < N)

    @triton.jit
    def _attention(
        query,
        keys,
        values,
        slots,
        lens,
        prefix,
        prefix_lse,
        out,
        scale,
        lse_head,
        query_width: tl.constexpr,
        key_width: tl.constexpr,
        value_width: tl.constexpr,
        slots_width: tl.constexpr,
        lse_row: tl.constexpr,
        H: tl.constexpr,
        G: tl.constexpr,
        N: tl.constexpr,
        D: tl.constexpr,
        GROUP: tl.constexpr,
        SIDE: tl.constexpr,
    ):
        row, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        length = tl.load(lens + row)
        n, d, g = tl.arange(0, SIDE), tl.arange(0, D), tl.arange(0, GROUP)
        seen, mine = n < length, g < G
        slot = tl.load(slots + row * slots_width + n, mask=n < N, other=0).to(tl.int64)
        head = key_head * G + g
        q = tl.load(query + row * query_width + head[:, None] * D + d[None, :], mask=mine[:, None], other=0.0)
        k = tl.load(
            keys + slot[:, None] * key_width + key_head * D + d[None, :], mask=seen[:, None], other=0.0
        )
        v = tl.load(
            values + slot[:, None] * value_width + key_head * D + d[None, :], mask=seen[:, None], other=0.0
        )
        score = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        # A row that sees nothing (padding) has weight 0, not NaN, on both sides.
        top = tl.maximum(tl.max(score, axis=1), -1e30)
        weight = tl.exp(score - top[:, None])
        total = tl.sum(weight, axis=1)
        own = tl.dot(weight.to(v.dtype), v) / tl.maximum(total, 1e-30)[:, None]
        own = own.to(out.dtype.element_ty).to(tl.float32)  # as an attention of its own would return it
        own_lse = top + tl.log(tl.maximum(total, 1e-30))
        lse = tl.load(prefix_lse + head * lse_head + row * lse_row, mask=mine, other=0.0).to(tl.float32)
        lse = tl.where(lse == float("inf"), float("-inf"), lse)  # an empty prefix
        line = (row * H + head[:, None]) * D + d[None, :]
        past = tl.load(prefix + line, mask=mine[:, None], other=0.0).to(tl.float32)
        top = tl.maximum(tl.maximum(lse, own_lse), -1e30)
        a, b = tl.exp(lse - top), tl.exp(own_lse - top)
        total = tl.maximum(a + b, 1e-30)
        merged = past * (a / total)[:, None] + own * (b / total)[:, None]
        tl.store(out + line, merged.to(out.dtype.element_ty), mask=mine[:, None])


def tree_metadata(
    seq_lens: Tensor,
    requests: Tensor,
    req_to_token: Tensor,
    mask: Tensor,
    live: int,
    prefix,
    tree,
    page_size: int,
) -> None:
    """Fill what FlashAttention's two passes over a tree read, in place, in one launch and a cumsum.

    seq_lens, requests: [B], lengths without drafts and rows of req_to_token [requests, slots]; mask: SGLang's
    full mask, per request N rows of its length + N; live: requests that are no padding. prefix, tree: objects
    with cache_seqlens_int32 [B] and [B*N], cu_seqlens_k of one more, page_table [B, pages] and [B*N, N].
    """
    batch, nodes = len(seq_lens), tree.page_table.shape[1]
    _metadata[batch, 1 + triton.cdiv(prefix.page_table.shape[1], PAGES)](
        seq_lens,
        requests,
        req_to_token,
        mask,
        prefix.cache_seqlens_int32,
        prefix.cu_seqlens_k,
        prefix.page_table,
        tree.page_table,
        tree.cache_seqlens_int32,
        live,
        req_to_token.stride(0),
        prefix.page_table.stride(0),
        tree.page_table.stride(0),
        page_size,
        N=nodes,
        SIDE=triton.next_power_of_2(nodes),
        BATCH=max(1024, triton.next_power_of_2(batch)),  # one kernel for all batches
        PAGES=PAGES,
    )
    torch.cumsum(tree.cache_seqlens_int32, 0, dtype=torch.int32, out=tree.cu_seqlens_k[1:])


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lens: Tensor,
    prefix: Tensor,
    prefix_lse: Tensor,
    scale: float,
) -> Tensor:
    """Attention of each node to the nodes that it sees, merged with its attention to the prefix: [B*N, H, D].

    query: [B*N, H, D], rows may be apart; keys, values: [cache slots, key heads, D]; slots: [B*N, N] and
    lens: [B*N], the first `lens` slots of a row count; prefix: [B*N, H, D] and its log-sum-exp: [H, B*N].
    """
    rows, heads, width = query.shape
    key_heads = keys.shape[1]
    out = torch.empty_like(prefix)
    _attention[rows, key_heads](
        query,
        keys,
        values,
        slots,
        lens,
        prefix,
        prefix_lse,
        out,
        scale,
        prefix_lse.stride(0),  # not a constant: it grows with the batch
        query.stride(0),
        keys.stride(0),
        values.stride(0),
        slots.stride(0),
        prefix_lse.stride(1),
        H=heads,
        G=heads // key_heads,
        N=slots.shape[1],
        D=width,
        GROUP=max(16, triton.next_power_of_2(heads // key_heads)),
        SIDE=max(16, triton.next_power_of_2(slots.shape[1])),
        num_warps=4,
    )
    return out
