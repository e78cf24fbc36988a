"""The switches of a tree's faster verification, on made-up engine classes."""

import sys
import types
from enum import Enum

import pytest
import torch

from fastmtp.sglang_ext import fast_tree, top_kernels, tree_kernels

PLACE = "sglang.srt.layers.attention.flashattention_backend"
WORKER = "sglang.srt.speculative.eagle_worker_v2"
MODE = types.SimpleNamespace(is_target_verify=lambda: True)
OTHER = types.SimpleNamespace(is_target_verify=lambda: False)
Kind = Enum("Kind", {"DECODER": "decoder"})
B, N, H, D = 2, 4, 4, 16


class FlashAttentionBackend:
    topk, fa_impl_ver, attn_cp_size, page_size, num_splits, max_context_len = 4, 3, 1, 1, 0, 64
    use_mla = has_swa = has_local_attention = use_sliding_window_kv_pool = fa_skip_kv_cache = False
    kv_cache_dtype_str, speculative_num_draft_tokens = "auto", N

    def __init__(self):
        self.written = []
        prefix = types.SimpleNamespace(
            page_table=None,
            cache_seqlens_int32=None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seq_len_q=N,
            swa_out_cache_loc=None,
        )
        tree = types.SimpleNamespace(page_table="slots", cache_seqlens_int32="lens")
        self.target_verify_metadata_topk_normal, self.target_verify_metadata_topk_expand = (
            {B: prefix},
            {B: tree},
        )
        self.forward_metadata, self.forward_metadata_spec_decode_expand = prefix, tree
        self.req_to_token, self.cache = torch.zeros(9, 64), torch.zeros(50, 2, D)
        self.token_to_kv_pool = types.SimpleNamespace(
            get_kv_buffer=lambda layer: (self.cache, self.cache),
            set_kv_buffer=lambda *a: self.written.append(a),
        )

    def _apply_cuda_graph_metadata(
        self,
        bs,
        req_pool_indices,
        seq_lens,
        seq_lens_sum,
        encoder_lens,
        forward_mode,
        spec_info,
        seq_lens_cpu,
        out_cache_loc=None,
    ):
        return "stock"

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, sinks=None):
        return "stock"


class EagleDraftWorker:
    def draft_forward(self): ...

    def _draft_extend_for_prefill(self): ...

    def _draft_extend_for_decode(self): ...


@pytest.fixture
def engine(monkeypatch):
    """The engine's two modules, fresh, whose functions pass for the known ones."""
    backend, worker = types.ModuleType(PLACE), types.ModuleType(WORKER)
    backend.FlashAttentionBackend = type("FlashAttentionBackend", (FlashAttentionBackend,), {})
    backend.KVWriteLoc = lambda loc, swa: loc
    backend.flash_attn_with_kvcache = lambda q, **more: (q + 1, "lse", None)
    worker.EagleDraftWorker = EagleDraftWorker
    worker.renorm_draft_probs = lambda logits, info, rejection: torch.softmax(logits, -1)
    worker.fast_topk = lambda values, topk, dim: torch.topk(values, topk, dim=dim)
    for module in (backend, worker):
        parts = module.__name__.split(".")
        for end in range(1, len(parts)):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tree_kernels, "triton", object())
    known = {name: code for _, functions in fast_tree.KNOWN.values() for name, code in functions.items()}
    monkeypatch.setattr(
        fast_tree, "digest", lambda text: next(known[n] for n in known if f"def {n}(" in text)
    )
    return backend, worker


@pytest.fixture
def stock(engine):
    return engine[0]


@pytest.fixture
def installed(stock, monkeypatch):
    monkeypatch.setenv(fast_tree.VARIABLE, "1")
    assert fast_tree.install() == ["metadata", "attention", "draft"]
    return stock


def metadata(backend, mode=MODE, **spec):
    info = types.SimpleNamespace(**{"custom_mask": torch.ones(3), "positions": torch.zeros(N)} | spec)
    lens, indices = torch.arange(3), torch.arange(3)
    return backend._apply_cuda_graph_metadata(
        bs=B,
        req_pool_indices=indices,
        seq_lens=lens,
        seq_lens_sum=None,
        encoder_lens=None,
        forward_mode=mode,
        spec_info=info,
        seq_lens_cpu=None,
        out_cache_loc=None,
    )


def attention(backend, mode=MODE, save=True, layer=(), **more):
    same = {
        "layer_id": 3,
        "tp_q_head_num": H,
        "tp_k_head_num": 2,
        "head_dim": D,
        "v_head_dim": D,
        "scaling": 0.5,
    }
    same |= {
        "is_cross_attention": False,
        "logit_cap": 0.0,
        "attn_type": Kind.DECODER,
        "k_scale": None,
        "v_scale": None,
    }
    batch = types.SimpleNamespace(forward_mode=mode, out_cache_loc="loc", _attn_output=None)
    layer = types.SimpleNamespace(**same | dict(layer))
    return backend.forward_extend(
        torch.zeros(B * N, H * D), "k", "v", layer, batch, save_kv_cache=save, **more
    )


@pytest.mark.parametrize("value", ["", "0"])
def test_off_without_the_variable(stock, monkeypatch, value):
    monkeypatch.setenv(fast_tree.VARIABLE, value)
    assert fast_tree.install() == []
    assert not hasattr(stock, "fastmtp_parts")
    assert metadata(stock.FlashAttentionBackend()) == "stock"


def test_one_part_alone(stock, monkeypatch):
    monkeypatch.setenv(fast_tree.VARIABLE, "attention")
    assert fast_tree.install() == fast_tree.install() == ["attention"]
    monkeypatch.setattr(tree_kernels, "tree_attention", lambda query, *rest: query)
    backend = stock.FlashAttentionBackend()
    assert metadata(backend) == "stock" and attention(backend).shape == (B * N, H * D)


@pytest.mark.parametrize("asked", ["mask", "metadata,2"])
def test_an_unknown_part_is_refused(stock, monkeypatch, asked):
    monkeypatch.setenv(fast_tree.VARIABLE, asked)
    with pytest.raises(ValueError, match="no part"):
        fast_tree.install()


def test_another_engine_is_refused_and_left_as_it_is(stock, monkeypatch):
    monkeypatch.setattr(fast_tree, "digest", lambda source: "another")
    monkeypatch.setenv(fast_tree.VARIABLE, "1")
    with pytest.raises(ValueError, match="not that of SGLang 0.5.17"):
        fast_tree.install()
    assert not hasattr(stock, "fastmtp_parts")


def test_metadata_of_a_tree_comes_from_the_kernel(installed, monkeypatch):
    calls = []
    monkeypatch.setattr(tree_kernels, "tree_metadata", lambda *args: calls.append(args))
    backend = installed.FlashAttentionBackend()
    backend.forward_metadata = backend.forward_metadata_spec_decode_expand = None
    assert metadata(backend) is None
    lens, requests, _, mask, live, prefix, tree, page = calls.pop()
    assert len(lens) == len(requests) == B and live == 1 and len(mask) == 3 and page == 1
    assert backend.forward_metadata is prefix and backend.forward_metadata_spec_decode_expand is tree
    assert prefix is backend.target_verify_metadata_topk_normal[B] and prefix.max_seq_len_k == 64


@pytest.mark.parametrize(
    "change", [{"topk": 1}, {"has_swa": True}, {"use_mla": True}, {"fa_impl_ver": 4}, {"attn_cp_size": 2}]
)
def test_what_the_kernels_do_not_know_stays_stock(installed, change):
    backend = installed.FlashAttentionBackend()
    vars(backend).update(change)
    assert metadata(backend) == attention(backend) == "stock" and not backend.written


def test_other_batches_and_layers_stay_stock(installed):
    backend = installed.FlashAttentionBackend()
    assert (
        metadata(backend, OTHER)
        == metadata(backend, custom_mask=None)
        == attention(backend, OTHER)
        == "stock"
    )
    assert attention(backend, save=False) == attention(backend, sinks=torch.ones(1)) == "stock"
    for change in ({"logit_cap": 30.0}, {"v_head_dim": 8}, {"head_dim": 48, "v_head_dim": 48}):
        assert attention(backend, layer=change) == "stock"
    backend.cache = torch.zeros(50, D, 2).transpose(1, 2)
    assert attention(backend) == "stock" and not backend.written


def test_attention_writes_the_cache_and_merges(installed, monkeypatch):
    calls = []
    monkeypatch.setattr(tree_kernels, "tree_attention", lambda *args: calls.append(args) or args[5] * 2)
    backend = installed.FlashAttentionBackend()
    result = attention(backend)
    assert result.shape == (B * N, H * D) and result.eq(2).all()  # (query 0 + 1) * 2
    (written,) = backend.written
    assert written[1:4] == ("loc", "k", "v")
    query, keys, _, slots, lens, _, lse, scale = calls.pop()
    assert query.shape == (B * N, H, D) and keys is backend.cache
    assert (slots, lens, lse, scale) == ("slots", "lens", "lse", 0.5)


def test_drafting_skips_the_softmax_of_a_tree_alone(engine, monkeypatch):
    _, worker = engine
    monkeypatch.setenv(fast_tree.VARIABLE, "draft")
    assert fast_tree.install() == ["draft"]
    logits, calls = torch.randn(4, 9), []
    monkeypatch.setattr(top_kernels, "softmax_top", lambda *args: calls.append(args) or ("p", "ids"))
    assert worker.fast_topk(worker.renorm_draft_probs(logits, None, False), 4, dim=-1) == ("p", "ids")
    assert calls == [(logits, 4)]
    expected = torch.softmax(logits, -1)
    chain = worker.fast_topk(worker.renorm_draft_probs(logits, None, False), 1, dim=-1)
    assert torch.equal(chain[0], expected.topk(1)[0]) and torch.equal(chain[1], expected.topk(1)[1])
    assert torch.equal(worker.renorm_draft_probs(logits, None, True), expected)
    assert worker.renorm_draft_probs(logits[:0], None, False).shape == (0, 9) and len(calls) == 1
