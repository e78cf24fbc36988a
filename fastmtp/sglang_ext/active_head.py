"""The draft's output head on the rows of one token map, switched in place; imports torch alone.

CUDA graphs keep addresses, so the active rows and their ids live in two buffers that never move: a switch
copies into them, on the stream that replays the graphs, and the next replay sees the new map. Results are
full-vocabulary logits, so every id that leaves is a token id, whatever map is active when it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ActiveHead:
    """head: [n, H], this rank's rows of the output matrix, token ids start..start+n-1; maps: {name: [K] token
    ids}.

    With the head split over GPUs each rank keeps its own part of every map; ranks then gather full logits as
    always.
    Parts differ in length: short ones are filled up with rows whose result goes to a column that is cut off.
    The rows are a multiple of 64, because products of odd sizes are slow.
    """

    def __init__(self, head: Tensor, maps: dict[str, Tensor], start: int = 0):
        self.head, self.start, width = head.detach(), start, head.shape[0]
        parts = {name: ids[(ids >= start) & (ids < start + width)] - start for name, ids in maps.items()}
        rows = max(1, *map(len, parts.values()))
        self.columns_of = {
            name: torch.cat([part, part.new_full((rows - len(part),), width)]).to(head.device)
            for name, part in parts.items()
        }
        self.rows, total = rows, -(-rows // 64) * 64
        # Is column `width` needed, where the results of filled-up rows go?
        self.spare = total > rows or any(len(part) < rows for part in parts.values())
        self.columns = torch.full((total,), width, dtype=torch.int64, device=head.device)
        self.weight = torch.zeros(total, head.shape[1], dtype=head.dtype, device=head.device)
        self.active = ""

    @torch.no_grad()
    def activate(self, name: str) -> bool:
        """Make map `name` the active one; whether that was a change. Nothing waits for the GPU."""
        if name == self.active:
            return False
        self.columns[: self.rows].copy_(self.columns_of[name])
        self.active = name
        self.refresh()
        return True

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the active rows from the head, after a switch or a change of its weights."""
        rows = self.columns[: self.rows].clamp(max=self.head.shape[0] - 1)
        torch.index_select(self.head, 0, rows, out=self.weight[: self.rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> [N, n] of the head's dtype: logits of the active map's ids, the dtype's least
        elsewhere.
        """
        found = torch.matmul(hidden.to(self.weight.dtype), self.weight.T)
        width = self.head.shape[0]
        full = found.new_full((found.shape[0], width + self.spare), torch.finfo(found.dtype).min)
        full.index_copy_(1, self.columns, found)
        return full[:, :width].contiguous() if self.spare else full
