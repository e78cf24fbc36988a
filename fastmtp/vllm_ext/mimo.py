"""MiMo for vLLM 0.32: the backbone that hands over normed states, and the head with a draft vocabulary.

vLLM's MiMoModel leaves out the final norm and applies it in `compute_logits`, so its drafter sees the state
before the norm. Heads of ours are trained on the state after it (SGLang's contract), which is what Qwen2Model
returns. The head's rows of a token map are a buffer that `load_weights` fills, so CUDA graphs may capture
them, and they are whole on every rank: with tensor parallelism each rank drafts the same tokens by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.mimo import MiMoForCausalLM as StockMiMoForCausalLM
from vllm.model_executor.models.mimo_mtp import MiMoMTP as StockMiMoMTP
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from fastmtp.checkpoint import is_post_norm
from fastmtp.vllm_ext import POST_NORM_READY, TOKEN_MAP, TOKEN_MAP_READY
from fastmtp.vocab.token_map import load_token_map


class MiMoForCausalLM(StockMiMoForCausalLM):
    """vLLM's, unless the folder says that its head was trained on the state after the norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        post_norm = is_post_norm(vars(vllm_config.model_config.hf_config))
        start = Qwen2ForCausalLM.__init__ if post_norm else StockMiMoForCausalLM.__init__
        start(self, vllm_config=vllm_config, prefix=prefix)
        self.post_norm = post_norm
        if post_norm:
            print(POST_NORM_READY, flush=True)  # at any log level: fastmtp.serve looks for it

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        if not self.post_norm:
            return super().compute_logits(hidden_states)
        return Qwen2ForCausalLM.compute_logits(self, hidden_states)


class MiMoMTP(StockMiMoMTP):
    """The head. With a token map in --additional-config it proposes the map's ids alone.

    ids: [N] int64, rising; rows: [N, H], the output matrix's rows of these ids.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        path = vllm_config.additional_config.get(TOKEN_MAP)
        self.mapped = path is not None
        if self.mapped:
            ids = load_token_map(path, self.config.vocab_size).to(self.lm_head.weight.device)
            self.register_buffer("ids", ids, persistent=False)
            self.register_buffer("rows", self.lm_head.weight.new_zeros(len(ids), self.config.hidden_size))
            print(f"{TOKEN_MAP_READY} of {len(ids)} ids", flush=True)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(self.taking_rows(weights) if self.mapped else weights)

    def taking_rows(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Pass the folder's tensors on, and copy the map's rows of the output matrix on the way."""
        matrix = ""
        for name, weight in weights:
            # A folder whose matrices are tied may hold the embedding alone.
            if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and not matrix):
                self.rows.copy_(weight[self.ids.to(weight.device)])
                matrix = name
            yield name, weight
        if not matrix:
            raise ValueError("the folder holds neither lm_head.weight nor model.embed_tokens.weight")

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [N, H] -> the most probable token of each row [N]: greedy drafts."""
        if not self.mapped:
            return self.model.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        return self.ids[(hidden_states @ self.rows.T).argmax(-1)]

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor | None:
        """hidden_states [N, H] -> logits [N, V], ids outside the map with no chance: sampled drafts."""
        if not self.mapped:
            return super().compute_logits(hidden_states, spec_step_idx)
        logits = hidden_states @ self.rows.T
        full = logits.new_full((len(logits), self.config.vocab_size), -torch.inf)
        return full.index_copy_(1, self.ids, logits)
