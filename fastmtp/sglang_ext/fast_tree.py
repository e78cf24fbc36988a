"""Draft trees in SGLang 0.5.17 with fewer kernels; FASTMTP_FAST_TREE names parts (1: all, 0: none).

`metadata`: what FlashAttention reads about a tree is written by one kernel before the verification's CUDA
graph, instead of some thirty; the same numbers. `attention`: inside the graph, attention to the tree's nodes
and merging it with the attention to the prefix are one kernel per layer instead of six; equal up to rounding.
Both need `--attention-backend fa3`; elsewhere SGLang's own code runs. `draft`: softmax and top-k of a step
are two kernels; at ties other drafts may be verified, but the text does not change.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtp.sglang_ext import top_kernels, tree_kernels

VARIABLE = "FASTMTP_FAST_TREE"
BACKEND = "layers/attention/flashattention_backend.py FlashAttentionBackend"
WORKER = "speculative/eagle_worker_v2.py EagleDraftWorker"
# Where each part steps in, and the digests of the functions that it replaces or relies on, in SGLang 0.5.17:
# another text may mean other work.
KNOWN = {
    "metadata": (BACKEND, {"_apply_cuda_graph_metadata": "62aef15c13ceb438"}),
    "attention": (BACKEND, {"forward_extend": "f09b0d85a9a912c4"}),
    "draft": (
        WORKER,
        {
            "draft_forward": "b4d3b11c3f20689d",
            "_draft_extend_for_prefill": "d259207b3b4b1cb6",
            "_draft_extend_for_decode": "9b6c1d7ab6bc0d69",
        },
    ),
}


def digest(source: str) -> str:
    """Of a function's text, whatever its indentation and empty lines."""
    lines = [line.strip() for line in source.splitlines()]
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:16]


def parts() -> list[str]:
    """What FASTMTP_FAST_TREE asks for. Raises ValueError for a part that does not exist."""
    asked = os.environ.get(VARIABLE, "")
    names = [*KNOWN] if asked == "1" else [name.strip() for name in asked.split(",")]
    names = [name for name in names if name not in ("", "0")]
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(f"{VARIABLE}={asked}: no part {unknown[0]}; expected 1 or some of {','.join(KNOWN)}")
    return names


def install() -> list[str]:
    """Replace the parts that are asked for, once per process; their names. Raises ValueError if SGLang's
    functions are not those of 0.5.17.
    """
    names = parts()
    if names and tree_kernels.triton is None:
        raise ValueError(f"{VARIABLE}: Triton is missing; set it to 0")
    modules = {}
    for name in names:
        place, functions = KNOWN[name]
        path, _, owner = place.partition(" ")
        modules[name] = importlib.import_module("sglang.srt." + path.removesuffix(".py").replace("/", "."))
        for function, known in functions.items():
            source = inspect.getsource(getattr(getattr(modules[name], owner), function))
            if digest(source) != known:
                raise ValueError(f"{VARIABLE}: {function} is not that of SGLang 0.5.17; set it to 0")
    for name in names:
        if name not in vars(modules[name]).setdefault("fastmtp_parts", []):
            modules[name].fastmtp_parts.append(name)
            REPLACE[name](modules[name])
    return names


def plain_tree(backend) -> bool:
    """Whether this backend verifies trees with FlashAttention 3 over one pool of keys without windows."""
    return (
        backend.topk > 1
        and backend.fa_impl_ver == 3
        and not (backend.use_mla or backend.has_swa or backend.has_local_attention)
        and not (backend.use_sliding_window_kv_pool or backend.fa_skip_kv_cache)
        and backend.attn_cp_size == 1
    )


def fast_metadata(stock) -> None:
    """Let one kernel do the tree branch of _apply_cuda_graph_metadata."""
    inner = stock.FlashAttentionBackend._apply_cuda_graph_metadata

    @functools.wraps(inner)
    def run(self, **given):  # SGLang names every argument
        bs, spec_info = given["bs"], given["spec_info"]
        mask = getattr(spec_info, "custom_mask", None)
        verifies = given["forward_mode"].is_target_verify() and mask is not None
        if not verifies or given["encoder_lens"] is not None or not plain_tree(self):
            return inner(self, **given)
        prefix = self.target_verify_metadata_topk_normal[bs]
        tree = self.target_verify_metadata_topk_expand[bs]
        lens, requests = given["seq_lens"][:bs], given["req_pool_indices"][:bs]
        live = spec_info.positions.numel() // self.speculative_num_draft_tokens
        tree_kernels.tree_metadata(
            lens, requests, self.req_to_token, mask, live, prefix, tree, self.page_size
        )
        prefix.max_seq_len_k = self.max_context_len
        self.forward_metadata, self.forward_metadata_spec_decode_expand = prefix, tree

    stock.FlashAttentionBackend._apply_cuda_graph_metadata = run


def fast_attention(stock) -> None:
    """Let one kernel do forward_extend's second pass over a tree and the merging."""
    inner = stock.FlashAttentionBackend.forward_extend

    @functools.wraps(inner)
    def run(self, q, k, v, layer, forward_batch, save_kv_cache=True, **more):
        keys, values = (None, None)
        if plain_layer(self, k, layer, forward_batch, save_kv_cache, more):
            keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        if keys is None or not all(plain_cache(cache, layer) for cache in (keys, values)):
            return inner(self, q, k, v, layer, forward_batch, save_kv_cache, **more)
        prefix, tree = self.forward_metadata, self.forward_metadata_spec_decode_expand
        loc = stock.KVWriteLoc(forward_batch.out_cache_loc, prefix.swa_out_cache_loc)
        self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, layer.k_scale, layer.v_scale)
        query = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        paged = (-1, self.page_size, layer.tp_k_head_num, layer.head_dim)
        out, lse, *_ = stock.flash_attn_with_kvcache(
            q=query,
            k_cache=keys.view(paged),
            v_cache=values.view(paged),
            page_table=prefix.page_table,
            cache_seqlens=prefix.cache_seqlens_int32,
            cu_seqlens_q=prefix.cu_seqlens_q,
            cu_seqlens_k_new=prefix.cu_seqlens_k,
            max_seqlen_q=prefix.max_seq_len_q,
            softmax_scale=layer.scaling,
            causal=False,
            return_softmax_lse=True,
            num_splits=self.num_splits,
            ver=self.fa_impl_ver,
        )
        merged = tree_kernels.tree_attention(
            query, keys, values, tree.page_table, tree.cache_seqlens_int32, out, lse, layer.scaling
        )
        return merged.view(-1, layer.tp_q_head_num * layer.head_dim)

    stock.FlashAttentionBackend.forward_extend = run


def plain_layer(backend, k, layer, forward_batch, save_kv_cache: bool, more: dict) -> bool:
    """Whether this is self-attention of a tree without anything that our kernel does not know."""
    return (
        forward_batch.forward_mode.is_target_verify()
        and plain_tree(backend)
        and backend.kv_cache_dtype_str == "auto"
        and k is not None
        and save_kv_cache
        and not any(value is not None for value in more.values())
        and getattr(forward_batch, "_attn_output", None) is None
        and not layer.is_cross_attention
        and not layer.logit_cap
        and layer.attn_type.value == "decoder"
        and layer.head_dim == layer.v_head_dim
        and layer.head_dim & (layer.head_dim - 1) == 0
    )


def plain_cache(cache, layer) -> bool:
    """Whether slots are rows of [heads, width]."""
    return cache.dim() == 3 and cache.stride()[1:] == (layer.head_dim, 1)


class Logits(NamedTuple):
    """Logits on their way from the draft worker's softmax to its top-k."""

    rows: Tensor


def fast_draft(worker) -> None:
    """Let two kernels do softmax and top-k of trees; the module calls its functions one after the other."""
    softmax, top = worker.renorm_draft_probs, worker.fast_topk

    def keep(next_token_logits, sampling_info, use_rejection_sampling):
        if use_rejection_sampling or not len(next_token_logits):
            return softmax(next_token_logits, sampling_info, use_rejection_sampling)
        return Logits(next_token_logits)

    def best(values, topk, dim):
        if isinstance(values, Logits):
            if topk > 1:
                return top_kernels.softmax_top(values.rows, topk)
            values = torch.softmax(values.rows, dim=-1)
        return top(values, topk, dim=dim)

    worker.renorm_draft_probs, worker.fast_topk = keep, best


REPLACE = {"metadata": fast_metadata, "attention": fast_attention, "draft": fast_draft}
