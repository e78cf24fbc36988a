"""One function of vLLM's CPU build, right: each request's temperature for all of its draft positions.

vLLM 0.32 writes it into a copy that nobody reads, so drafts are verified with whatever the memory held
(github.com/vllm-project/vllm/issues/55005): hardly a draft is accepted, and the text is not the model's.
Greedy decoding does not call it.
"""

from __future__ import annotations

import contextlib

from torch import Tensor, where


def expand(
    output: Tensor,
    values: Tensor,
    ends: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # noqa: N803  (vLLM passes it by this name)
) -> None:
    """Fill output [T] with each request's value, once per draft. values: [B]; ends: [B], running sums of the
    requests' numbers of drafts, T the last of them. A value equal to `replace_from` becomes `replace_to`.
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    output.copy_(where(values == replace_from, replace_to, values).repeat_interleave(counts))


def repair() -> None:
    """Put `expand` in the place of vLLM's, before vLLM's worker looks for it."""
    with contextlib.suppress(ImportError):  # other versions may not have the module
        from vllm.utils import cpu_triton_utils

        cpu_triton_utils._expand_kernel_impl = expand
