"""Attention for decoding, under a name that transformers knows: as its `sdpa`, without the copies of keys and
values that it makes for every head of a group.

The query heads that share a key head are laid along the query dimension, so each key is read once per group.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "fastmtp_decoding"  # transformers' name for it


def attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    query: [B, Hq, n, D]; key, value: [B, Hkv, T, D]; attention_mask: bool, broadcast to [B, 1, n, T], or
    None: causal. Returns [B, n, Hq, D].
    """
    batch, heads, count, width = query.shape
    if attention_mask is None and count > 1:
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return context.transpose(1, 2), None
    groups = key.shape[1]
    if attention_mask is not None and count > 1:
        attention_mask = attention_mask.repeat(*[1] * (attention_mask.dim() - 2), heads // groups, 1)
    grouped = query.reshape(batch, groups, -1, width)
    context = F.scaled_dot_product_attention(grouped, key, value, attention_mask)
    return context.view(batch, heads, count, width).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
