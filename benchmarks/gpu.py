"""Time and memory bandwidth of the GPU, by its own events."""

from __future__ import annotations

import torch


def timed(work, repeats: int = 50) -> float:
    """Mean seconds of `work` on the GPU over `repeats` calls, after three as warm-up."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        work()
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def copy_bandwidth(size: int = 4 << 30) -> float:
    """Bytes/s of copying on the GPU, read and write counted: what a memory-bound kernel can hope for."""
    seconds = _copy_seconds(size)
    torch.cuda.empty_cache()  # a server that starts next needs the room
    return 2 * size / seconds


def _copy_seconds(size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), repeats=20)
