"""What an engine is asked to serve, in our words; each engine checks it and makes its command line of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmtp.engines.address import HOST
from fastmtp.trees.tree import DynamicTree


@dataclass(frozen=True)
class Serving:
    """num_steps: drafts per cycle, 0 for plain decoding; the depth of `tree`, if there is one.

    token_map: the draft vocabulary's file; token_maps ("en=PATH,zh=PATH") follow the requests' languages.
    adaptive: SGLang changes the number of steps while it runs, by its own table or that of the file `table`.
    sampled: drafts are drawn from the head's distribution, not its likeliest token; for temperatures above 0.
    tp: GPUs to split the model over. flags: the engine's own, which override what we choose.
    """

    model: str
    num_steps: int = 3
    token_map: str | None = None
    token_maps: str | None = None
    tree: DynamicTree | None = None
    adaptive: bool = False
    table: str | None = None
    tp: int = 1
    host: str = HOST
    port: int = 30000
    flags: Sequence[str] = ()
    sampled: bool = False
