"""The GPU kernels against the dense reference on the CPU in float64: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import tiny_model

from fastmtp.data.recipe_check import flash_attn_fault
from fastmtp.head.losses import IGNORE, cross_entropy
from fastmtp.head.recursion import chain_attention, visible
from fastmtp.head.teacher import likeliest, soft_cross_entropy
from fastmtp.head.varlen import documents, packed_attention, use_flash_attn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = (1, 130, 64, 333, 17)


def segments() -> torch.Tensor:
    return torch.cat([torch.full((n,), number) for number, n in enumerate(LENGTHS, 1)])[None]


def near(found: torch.Tensor, wanted: torch.Tensor, share: float) -> None:
    """The distance is a small share of the length: bfloat16 keeps eight bits; entries may be tiny."""
    distance = (found.double().cpu() - wanted.double()).norm() / wanted.double().norm()
    assert distance < share, float(distance)


@pytest.mark.parametrize("width,heads,groups", [(64, 9, 3), (128, 32, 8)])
@pytest.mark.parametrize("own", [0, 1, 2, 6])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_attention(width, heads, groups, own, flash_attn, request):
    if flash_attn and (fault := flash_attn_fault()):
        pytest.skip(f"flash-attn-4 does not load: {fault}")
    request.addfinalizer(lambda: use_flash_attn(False))
    use_flash_attn(flash_attn)
    torch.manual_seed(own)
    shapes = [(1, heads, sum(LENGTHS), width)] + [(1, groups, sum(LENGTHS), width)] * (2 + 2 * own)
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    upstream = torch.randn(shapes[0]).bfloat16()
    wide = [x.double().requires_grad_() for x in inputs]
    pairs = list(zip(wide[3::2], wide[4::2], strict=True))
    wanted = chain_attention(*wide[:3], pairs, visible(segments()))
    wanted.backward(upstream.double())
    near_ = [x.cuda().requires_grad_() for x in inputs]
    pairs = list(zip(near_[3::2], near_[4::2], strict=True))
    found = packed_attention(*near_[:3], pairs, documents(segments().cuda()))
    found.backward(upstream.cuda())
    near(found, wanted, 0.01)
    for x, y in zip(near_, wide, strict=True):
        near(x.grad, y.grad, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1000, 49152, 151680])
def test_cross_entropy(dtype, vocabulary):
    torch.manual_seed(0)
    hidden, weight = torch.randn(77, 64).to(dtype), torch.randn(vocabulary, 64).to(dtype) * 0.3
    targets = torch.randint(0, vocabulary, (77,))
    targets[:2] = torch.tensor([0, vocabulary - 1])
    upstream = torch.rand(77) + 0.5
    wide = hidden.double().requires_grad_()
    wanted = F.cross_entropy(wide @ weight.double().t(), targets, reduction="none")
    (wanted * upstream).sum().backward()
    ours = hidden.cuda().requires_grad_()
    found = cross_entropy(ours, weight.cuda(), targets.cuda())
    (found * upstream.cuda()).sum().backward()
    share = 0.01 if dtype == torch.bfloat16 else 1e-3
    near(found, wanted.detach(), share)
    near(ours.grad, wide.grad, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cross_entropy(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(77, 64).to(dtype), torch.randn(49152, 64).to(dtype) * 0.3
    teacher = torch.randn(77, 64).to(dtype) * 0.5 + hidden
    ids, probs = likeliest(teacher.double(), weight.double(), 16)
    wide = hidden.double().requires_grad_()
    wanted, drafts = soft_cross_entropy(wide, weight.double(), ids, probs.double())
    wanted.sum().backward()
    ours = hidden.cuda().requires_grad_()
    found, picked = soft_cross_entropy(ours, weight.cuda(), ids.cuda(), probs.float().cuda())
    found.sum().backward()
    near(found, wanted.detach(), 0.02)
    near(ours.grad, wide.grad, 0.02)
    assert (picked.cpu() == drafts).float().mean() > 0.9  # bfloat16 has ties


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", ["paper", "exact"])
def test_model(attention, compiled):
    """As it trains: bfloat16 backbone, float32 head under autocast, documents packed."""
    size = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320)
    net = tiny_model(3, spread=0.05, mtp_attention=attention, mtp_num_steps=3, **size)
    net = net.bfloat16().double()  # the very numbers that the GPU has
    net.head.requires_grad_(True)
    ids = torch.randint(0, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    batch = dict(input_ids=ids, position_ids=positions, labels=torch.where(positions > 2, ids, IGNORE))
    wanted = net(**batch)
    wanted.loss.backward()
    gradients = {name: parameter.grad for name, parameter in net.head.named_parameters()}
    net.zero_grad()
    net.bfloat16().cuda().head.float()
    if compiled:
        net.compile_layers()
    with torch.autocast("cuda", torch.bfloat16):
        found = net(**{name: tensor.cuda() for name, tensor in batch.items()})
    found.loss.backward()
    near(found.loss.detach(), wanted.loss.detach(), 0.01)
    for name, parameter in net.head.named_parameters():
        near(parameter.grad, gradients[name], 0.1)
