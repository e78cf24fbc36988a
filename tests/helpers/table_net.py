"""A model whose texts have a distribution that can be written down."""

from types import SimpleNamespace

import torch
from torch import nn


class TableBackbone:
    """The state after a token is the token, as a one-hot row."""

    def embed_tokens(self, ids):
        return nn.functional.one_hot(ids, 4).float()


class TableNet:
    """A bigram model behind the decoder's interface: next-token tables for the backbone and for the head, so
    cheap that 20,000 texts take seconds, so simple that their distribution is a product of table entries.
    """

    def __init__(self):
        size = 4
        generator = torch.Generator().manual_seed(3)
        self.vocab_size = size
        self.lm_head = nn.Linear(size, size, bias=False)
        self.lm_head.weight.data = torch.randn(size, size, generator=generator) * 1.5
        self.lm_head.requires_grad_(False)
        self.mix = (
            torch.eye(size) + torch.randn(size, size, generator=generator) * 0.5
        )  # the head: alike, not equal
        self.p = self.lm_head.weight.T.softmax(-1)
        self.config = SimpleNamespace(num_key_value_heads=1, _attn_implementation=None)
        attention = SimpleNamespace(head_dim=1)
        self.model = TableBackbone()
        self.head = SimpleNamespace(
            self_attn=attention, fuse=lambda h, e: e, qkv=self.qkv, finish=self.finish
        )

    def backbone(self, input_ids, **_):
        states = self.model.embed_tokens(input_ids)
        return states, states

    def qkv(self, fused, cos, sin):
        return (fused.new_zeros(1, 1, fused.shape[1], 1),) * 3

    def finish(self, fused, context):
        return fused @ self.mix.T

    def rope(self, positions):
        return positions, positions

    @staticmethod
    def without_cache(monkeypatch) -> None:
        """The decoder's cache of keys, which this network does not need."""
        empty = SimpleNamespace(crop=lambda n: None, layers=[])
        monkeypatch.setattr("fastmtp.reference.speculative.DynamicCache", lambda config: empty)
