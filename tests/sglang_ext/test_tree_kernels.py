"""The kernels of a tree's verification against plain torch, on a GPU or with TRITON_INTERPRET=1."""

import os
import types

import pytest
import torch

from fastmtp.sglang_ext import tree_kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    tree_kernels.triton is None or not (GPU or INTERPRETED), reason="Triton on a GPU, or TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def seen_slots(lengths, requests, req_to_token, mask, live, nodes):
    """Per node the slots that it sees, then the others, and how many it sees; read off the mask by cell."""
    table, counts, start = [], [], 0
    for b, (length, request) in enumerate(zip(lengths.tolist(), requests.tolist(), strict=True)):
        own = req_to_token[request, length : length + nodes].tolist()
        for node in range(nodes):
            first = start + node * (length + nodes) + length
            row = mask[first : first + nodes].tolist() if b < live else [bool(mask[0])] * nodes
            table.append([s for s, sees in zip(own, row, strict=True) if sees])
            counts.append(len(table[-1]))
            table[-1] += [s for s, sees in zip(own, row, strict=True) if not sees]
        start += nodes * (length + nodes)
    return torch.tensor(table), torch.tensor(counts)


def buffers(rows, width):
    """Metadata whose every cell is -7, as FlashAttention's backend keeps it."""
    full = {"dtype": torch.int32, "device": DEVICE}
    starts = torch.zeros(rows + 1, **full)
    lens, table = torch.full((rows,), -7, **full), torch.full((rows, width), -7, **full)
    return types.SimpleNamespace(cache_seqlens_int32=lens, cu_seqlens_k=starts, page_table=table)


@pytest.mark.parametrize(
    ("batch", "nodes", "live", "page"),
    [(1, 16, 1, 1), (3, 8, 3, 1), (4, 12, 2, 1), (2, 6, 2, 4), (5, 24, 5, 1)],
)
def test_metadata(batch, nodes, live, page):
    slots = 96
    req_to_token = torch.randperm(40 * slots).view(40, slots).int()
    lengths, requests = torch.randint(0, slots - nodes, (batch,)), torch.randperm(40)[:batch]
    lengths[live:] = 1  # padding
    mask = torch.rand(int(((lengths + nodes) * nodes).sum())) < 0.6
    table, counts = seen_slots(lengths, requests, req_to_token, mask, live, nodes)
    prefix, tree = buffers(batch, slots), buffers(batch * nodes, nodes)
    inputs = [t.to(DEVICE) for t in (lengths, requests, req_to_token, mask)]
    tree_kernels.tree_metadata(*inputs, live, prefix, tree, page)
    assert tree.page_table.tolist() == table.tolist()
    assert tree.cache_seqlens_int32.tolist() == counts.tolist()
    assert tree.cu_seqlens_k.tolist() == [0, *counts.cumsum(0).tolist()]
    assert prefix.cache_seqlens_int32.tolist() == lengths.tolist()
    assert prefix.cu_seqlens_k.tolist() == [0, *lengths.cumsum(0).tolist()]
    for row, length, request in zip(prefix.page_table.tolist(), lengths.tolist(), requests, strict=True):
        pages = -(-length // page)
        expected = req_to_token[request, : pages * page : page] // page
        assert row == [*expected.tolist(), *[-7] * (slots - pages)]


def attend(query, keys, values, scale):
    """Output [H, D] and log of the sum [H] of one query [H, D] over keys and values [n, key heads, D]."""
    keys, values = (t.float().repeat_interleave(len(query) // t.shape[1], 1) for t in (keys, values))
    scores = torch.einsum("hd,nhd->hn", query.float(), keys) * scale
    return torch.einsum("hn,nhd->hd", scores.softmax(1), values), scores.logsumexp(1)


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize(
    ("batch", "nodes", "heads", "key_heads", "width"),
    [(1, 16, 8, 2, 64), (2, 5, 6, 2, 32), (1, 24, 4, 4, 128)],
)
def test_attention(batch, nodes, heads, key_heads, width, prefixed):
    dtype = torch.bfloat16 if GPU else torch.float32  # the interpreter multiplies bits of bfloat16
    rows, slots, scale = batch * nodes, 300, width**-0.5
    query = torch.randn(rows, heads * width + 7, dtype=dtype)[:, : heads * width].view(rows, heads, width)
    keys, values = (torch.randn(slots, key_heads, width, dtype=dtype) for _ in range(2))
    tables = torch.stack([1 + torch.randperm(slots - 1)[:nodes] for _ in range(rows)]).int()
    lens = torch.randint(1, nodes + 1, (rows,)).int()
    pasts = [1 + torch.randperm(slots - 1)[:37] for _ in range(batch)]
    prefix = torch.zeros(rows, heads, width, dtype=dtype)
    lse, whole = torch.full((heads, rows), float("inf")), torch.zeros(rows, heads, width)
    for row in range(rows):
        past, seen = pasts[row // nodes], tables[row, : lens[row]].long()
        if prefixed:
            result, lse[:, row] = attend(query[row], keys[past], values[past], scale)
            prefix[row] = result.to(dtype)
            seen = torch.cat([past, seen])
        whole[row], _ = attend(query[row], keys[seen], values[seen], scale)
        tables[row, lens[row] :] = 0
    keys[0] = values[0] = float("nan")  # nothing may come from behind a row's length
    inputs = [t.to(DEVICE) for t in (query, keys, values, tables, lens, prefix, lse)]
    merged = tree_kernels.tree_attention(*inputs, scale)
    assert (merged.float().cpu() - whole).abs().max() < (2e-2 if GPU else 2e-6)


def test_a_row_that_sees_nothing_is_zero():
    zeros = torch.zeros(4, 4, 32, device=DEVICE)
    cache = torch.ones(9, 2, 32, device=DEVICE)
    slots = torch.zeros(4, 4, dtype=torch.int32, device=DEVICE)
    lse = torch.full((4, 4), float("-inf"), device=DEVICE)
    assert tree_kernels.tree_attention(zeros + 1, cache, cache, slots, slots[0], zeros, lse, 0.1).eq(0).all()
