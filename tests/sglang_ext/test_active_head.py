"""The active rows: right ids, buffers that never move, a head split over two processes."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastmtp.sglang_ext.active_head import ActiveHead

V, H, K = 96, 16, 24


def head_and_maps(dtype=torch.float32, size=K):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(V, H, generator=generator).to(dtype)
    maps = {n: torch.randperm(V, generator=generator)[:size].sort().values for n in ("en", "zh")}
    maps["low"] = torch.arange(size)  # with K all of it in the first half
    return head, maps, torch.randn(7, H, generator=generator).to(dtype)


@pytest.mark.parametrize("size", [K, 64])  # filled up to 64 rows, and as it is
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_the_full_heads_inside_the_map(dtype, size):
    head, maps, hidden = head_and_maps(dtype, size)
    active = ActiveHead(head, maps)
    assert len(active.weight) == 64 and active.spare == (size < 64)
    for name in ("en", "zh", "en"):
        assert active.activate(name)
        got, full = active.logits(hidden), hidden @ head.T
        assert got.shape == full.shape and got.is_contiguous() and torch.isfinite(got).all()
        torch.testing.assert_close(got[:, maps[name]], full[:, maps[name]])
        outside = torch.ones(V, dtype=torch.bool).index_fill(0, maps[name], False)
        assert (got.float().softmax(-1)[:, outside] == 0).all()
        assert torch.isin(got.argmax(-1), maps[name]).all()


def test_buffers_never_move():
    head, maps, hidden = head_and_maps()
    active = ActiveHead(head, maps)
    places = active.weight.data_ptr(), active.columns.data_ptr()
    for name in ("zh", "low", "en"):
        active.activate(name)
        assert (active.weight.data_ptr(), active.columns.data_ptr()) == places
    assert not active.activate("en"), "no copy where nothing changes"
    head.mul_(2)
    before = active.logits(hidden)
    active.refresh()
    torch.testing.assert_close(active.logits(hidden)[:, maps["en"]], 2 * before[:, maps["en"]])


def _rank(rank: int, port: int, out) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    head, maps, hidden = head_and_maps()
    half = V // 2
    active = ActiveHead(head[rank * half : (rank + 1) * half].clone(), maps, rank * half)
    found = {}
    for name in ("en", "low", "zh"):
        active.activate(name)
        mine = active.logits(hidden)
        parts = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine)  # what the engine does with a split head
        found[name] = torch.cat(parts, dim=1)
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def test_two_ranks_draft_what_one_does(tmp_path):
    head, maps, hidden = head_and_maps()
    mp.spawn(_rank, (29700 + os.getpid() % 200, tmp_path / "found.pt"), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    whole = ActiveHead(head, maps)
    for name in ("en", "low", "zh"):
        whole.activate(name)
        torch.testing.assert_close(found[name], whole.logits(hidden))
        assert torch.isin(found[name].argmax(-1), maps[name]).all()


def test_a_rank_without_any_row_of_the_map_says_nothing():
    head, maps, hidden = head_and_maps()
    second = ActiveHead(head[V // 2 :].clone(), maps, V // 2)
    second.activate("low")
    assert (second.logits(hidden) == torch.finfo(torch.float32).min).all()
