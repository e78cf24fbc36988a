"""Packed attention against the dense one. A slow program with their contract takes the place of torch's flash
kernels and of flash-attn's.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import tiny_model
from torch import Tensor

from fastmtp.head import modeling_mimo, varlen
from fastmtp.head.losses import IGNORE
from fastmtp.head.varlen import Documents, documents


def _scores(q: Tensor, k: Tensor, rows: slice) -> Tensor:
    """[Hq, n, n] scaled scores of one document, -inf above the diagonal."""
    keys = k[rows].repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q[rows], keys) * q.shape[-1] ** -0.5
    return scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))


def slow_forward(q: Tensor, k: Tensor, v: Tensor, where: Documents):
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for start, end in zip(where.starts.tolist(), where.starts.tolist()[1:], strict=False):
        assert 0 < end - start <= where.longest
        rows = slice(start, end)
        scores = _scores(q, k, rows)
        lse[:, rows] = scores.logsumexp(-1)
        values = v[rows].repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse, q.new_zeros(()), q.new_zeros(())


def slow_backward(grad, q, k, v, out, lse, seed, offset, where: Documents):
    """From `out` and `lse` as they are given, which is all that the kernel does with them."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    times = q.shape[1] // k.shape[1]
    for start, end in zip(where.starts.tolist(), where.starts.tolist()[1:], strict=False):
        rows = slice(start, end)
        weights = (_scores(q, k, rows) - lse[:, rows, None]).exp()
        slopes = torch.einsum("qhd,khd->hqk", grad[rows], v[rows].repeat_interleave(times, 1))
        slopes = weights * (slopes - (grad[rows] * out[rows]).sum(-1).t()[:, :, None]) * q.shape[-1] ** -0.5
        dq[rows] = torch.einsum("hqk,khd->qhd", slopes, k[rows].repeat_interleave(times, 1))
        dk[rows] = torch.einsum("hqk,qhd->khd", slopes, q[rows]).unflatten(1, (-1, times)).sum(2)
        dv[rows] = torch.einsum("hqk,qhd->khd", weights, grad[rows]).unflatten(1, (-1, times)).sum(2)
    return dq, dk, dv


def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, return_lse=False,
):  # fmt: skip
    """The arguments of flash-attn-4 4.0.0b36 as far as causal attention needs them, and its five results."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and max_seqlen_q == max_seqlen_k
    assert causal and softmax_scale == q.shape[-1] ** -0.5 and qv is seqused_q is seqused_k is None
    out, lse, *_ = slow_forward(q, k, v, Documents(cu_seqlens_q, max_seqlen_q))
    return out, lse if return_lse else None, None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
):  # fmt: skip
    assert lse.shape == (q.shape[1], q.shape[0]) and out.shape == dout.shape == q.shape
    assert causal and softmax_scale == q.shape[-1] ** -0.5 and cu_seqlens_k is cu_seqlens_q
    return slow_backward(dout, q, k, v, out, lse, None, None, Documents(cu_seqlens_q, max_seqlen_q))


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for the package flash-attn-4."""
    interface = SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    yield
    varlen.use_flash_attn(False)


@pytest.fixture(params=["torch", "flash-attn"])
def kernels(request, monkeypatch, flash_attn):
    if request.param == "flash-attn":
        varlen.use_flash_attn(True)
    else:
        monkeypatch.setattr(varlen, "flash_forward", slow_forward)
        monkeypatch.setattr(varlen, "flash_backward", slow_backward)
    monkeypatch.setattr(modeling_mimo, "flash_usable", lambda x: True)


def test_documents_are_runs_within_rows():
    segments = torch.tensor([[1, 1, 2, 3, 3, 3], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    found = documents(segments)
    assert found.starts.tolist() == [0, 2, 3, 6, 8, 12, 18, 20, 24] and found.starts.dtype == torch.int32
    assert found.longest == 6
    assert documents(torch.ones(1, 5, dtype=torch.int64)) == (pytest.approx(torch.tensor([0, 5])), 5)


def test_gradients_of_the_merge_by_finite_differences(kernels):
    generator = torch.Generator().manual_seed(0)
    where = documents(torch.tensor([[1, 1, 1, 2, 2, 3]]))
    shapes = [(6, 4, 3)] + [(6, 2, 3)] * 6
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *x: varlen._Attention.apply(where, *x), inputs)
    assert torch.autograd.gradcheck(lambda *x: varlen._Attention.apply(where, *x), inputs[:3])


def batches() -> dict[str, dict[str, Tensor]]:
    """Four documents of 3 to 11 tokens: packed into one row, and padded on either side."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 97, (n,), generator=generator) for n in (7, 3, 11, 5)]
    packed = dict(
        input_ids=torch.cat(texts)[None],
        position_ids=torch.cat([torch.arange(len(text)) for text in texts])[None],
    )
    found = {"packed": packed}
    for side in ("left", "right"):
        ids, mask = torch.zeros(4, 11, dtype=torch.int64), torch.zeros(4, 11, dtype=torch.int64)
        for row, text in enumerate(texts):
            at = slice(11 - len(text), 11) if side == "left" else slice(0, len(text))
            ids[row, at], mask[row, at] = text, 1
        found[side] = dict(input_ids=ids, attention_mask=mask)
    for batch in found.values():
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        starts = batch["position_ids"] == 0 if "position_ids" in batch else real.cumsum(1) <= 1
        batch["labels"] = torch.where((real == 1) & ~starts, batch["input_ids"], IGNORE)
    return found


def loss_and_gradients(net, batch) -> list[Tensor]:
    net.head.requires_grad_(True).zero_grad()
    loss = net(**batch).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in net.head.parameters())]


@pytest.mark.parametrize("attention", ["paper", "exact"])
@pytest.mark.parametrize("name", ["packed", "left", "right"])
def test_the_model_on_kernels_is_the_dense_one(kernels, monkeypatch, name, attention):
    net, batch = (
        tiny_model(3, torch.float64, spread=0.15, mtp_attention=attention, mtp_num_steps=4),
        batches()[name],
    )
    found = loss_and_gradients(net, batch)
    assert net.config._attn_implementation != modeling_mimo.VARLEN, "the attention of generation is changed"
    monkeypatch.setattr(modeling_mimo, "flash_usable", lambda x: False)
    torch.testing.assert_close(found, loss_and_gradients(net, batch))


def test_flash_attn_is_refused_where_it_cannot_run(flash_attn, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(RuntimeError, match="Hopper"):
        varlen.use_flash_attn(True)
    assert varlen._flash_attn is None
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    with pytest.raises(ImportError):
        varlen.use_flash_attn(True)


@pytest.mark.parametrize("dense", [True, False])
def test_packed_is_padded(kernels, monkeypatch, dense):
    monkeypatch.setattr(modeling_mimo, "flash_usable", lambda x: not dense)
    net, cases = tiny_model(3, torch.float64, spread=0.15), batches()
    wanted = loss_and_gradients(net, cases["packed"])
    for side in ("left", "right"):
        torch.testing.assert_close(loss_and_gradients(net, cases[side]), wanted)


@pytest.mark.slow
def test_compiled_layers_are_the_plain_ones(monkeypatch):
    """As graphs and their derivatives; code for the CPU is left aside, it would take a minute to make."""
    compile_as = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile_as(f, **k, backend="aot_eager"))
    net, cases = tiny_model(3, spread=0.15, num_hidden_layers=1), batches()
    del cases["left"]
    wanted = {name: loss_and_gradients(net, batch) for name, batch in cases.items()}
    net.compile_layers()
    for name, batch in cases.items():
        torch.testing.assert_close(loss_and_gradients(net, batch), wanted[name], rtol=1e-4, atol=1e-5)
