"""Losses against the backbone's distribution, by hand, against autograd, and in chunks; the objective's
weights.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import tiny_model

from fastmtp.head import teacher
from fastmtp.head.losses import (
    IGNORE,
    Objective,
    cross_entropy,
    mtp_loss,
    step_targets,
    step_weights,
)
from fastmtp.head.teacher import TAIL, greedy, likeliest, soft_cross_entropy

VOCAB, WIDTH, ROWS = 61, 16, 23


def objective(**changes) -> Objective:
    return Objective(**dict(beta=0.6, labels="data", top_k=5, prefix_floor=1.0) | changes)


@pytest.fixture(params=["whole", "chunks", "single rows"])
def chunking(request, monkeypatch):
    rows = {"whole": 1000, "chunks": 5, "single rows": 0}[request.param]
    monkeypatch.setattr(teacher, "CHUNK_BYTES", 4 * VOCAB * rows)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    hidden, backbone = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    return weight, hidden, backbone


def buckets(probabilities, ids):
    kept = probabilities.gather(1, ids)
    return torch.cat([kept, (1 - kept.sum(1, keepdim=True)).clamp(min=1e-9)], dim=1)


def written_out(hidden, weight, ids, probs):
    """The definition, over whole rows and with autograd."""
    q = buckets(F.linear(hidden.to(weight.dtype), weight).float().softmax(-1), ids)
    p = torch.cat([probs, (1 - probs.sum(1, keepdim=True)).clamp(min=1e-9)], dim=1)
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cross_entropy_is_the_definition(chunking, dtype):
    weight, hidden, backbone = inputs(dtype)
    ids, probs = likeliest(backbone, weight, 7)
    upstream = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) + 0.5
    ours, full = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found, drafts = soft_cross_entropy(ours, weight, ids, probs)
    wanted = written_out(full, weight, ids, probs)
    (found * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    near = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grad, full.grad, **near)
    assert torch.equal(drafts, F.linear(hidden.to(dtype), weight).argmax(-1))


def test_one_hot_kl_is_cross_entropy(chunking):
    weight, hidden, _ = inputs()
    targets = torch.arange(ROWS)
    ours, full = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found, _ = soft_cross_entropy(ours, weight, targets[:, None], torch.ones(ROWS, 1))
    wanted = cross_entropy(full, weight, targets)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours.grad, full.grad)


def test_kl_is_zero_and_flat_where_the_draft_is_the_backbone():
    weight, _, backbone = inputs()
    ids, probs = likeliest(backbone, weight, 7)
    same = backbone.clone().requires_grad_()
    losses, _ = soft_cross_entropy(same, weight, ids, probs)
    losses.sum().backward()
    assert losses.abs().max() < 1e-5
    assert same.grad.abs().max() < 1e-5


def test_a_draft_surer_than_its_rounding_gives_finite_gradients():
    weight = torch.eye(4)
    hidden = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)
    losses, _ = soft_cross_entropy(hidden, weight, torch.tensor([[0]]), torch.tensor([[0.9]]))
    losses.sum().backward()
    assert losses.item() < 0.1 * torch.tensor(1 / TAIL).log() and hidden.grad.abs().max() <= 1.0


def test_the_backbones_likeliest_tokens(chunking):
    weight, _, backbone = inputs()
    logits = backbone @ weight.T
    assert torch.equal(greedy(backbone, weight), logits.argmax(-1))
    ids, probs = likeliest(backbone, weight, 4)
    likely = logits.softmax(-1).topk(4)
    assert torch.equal(ids, likely.indices)
    torch.testing.assert_close(probs, likely.values)
    assert likeliest(backbone, weight, 100)[1].sum(1) == pytest.approx(torch.ones(ROWS), abs=1e-5)


def chats():
    """(labels, segments) [2, 14]: two packed documents, and one with padding."""
    labels = torch.randint(0, 97, (2, 14), generator=torch.Generator().manual_seed(3))
    labels[0, :2] = labels[0, 7:9] = labels[1, :3] = labels[1, 12:] = IGNORE
    segments = torch.ones_like(labels)
    segments[0, 7:], segments[1, 12:] = 2, 0
    return labels, segments


def states_of(steps=3):
    generator = torch.Generator().manual_seed(4)
    net = tiny_model(3)
    states = [torch.randn(2, 14, 64, generator=generator).requires_grad_() for _ in range(steps)]
    return states, torch.randn(2, 14, 64, generator=generator), net.lm_head.weight


def loop(states, hidden, weight, labels, segments, o: Objective) -> torch.Tensor:
    """mtp_loss in plain loops: one target after another."""
    total = 0.0
    items = (labels[:, 1:] != IGNORE).sum()
    targets = step_targets(labels, segments, len(states))
    for b in range(labels.shape[0]):
        for p in range(labels.shape[1]):
            reached = True
            for k, alpha in enumerate(step_weights(len(states), o.beta), 1):
                text = targets[k - 1][b, p]
                if text == IGNORE:
                    break
                backbone = hidden[b, p + k] @ weight.T
                logits = states[k - 1][b, p] @ weight.T
                if o.labels == "kl":
                    probs, ids = backbone.softmax(-1).topk(o.top_k)
                    loss = written_out(states[k - 1][b, p][None], weight, ids[None], probs[None])[0]
                else:
                    loss = F.cross_entropy(logits, text if o.labels == "data" else backbone.argmax())
                share = 1.0 if reached else o.prefix_floor
                total = total + alpha * share * loss / items
                reached = reached and bool(logits.argmax() == text)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(labels="argmax"),
        dict(labels="kl"),
        dict(labels="kl", top_k=97),
        dict(prefix_floor=0.1),
        dict(labels="argmax", prefix_floor=0.0),
        dict(labels="kl", prefix_floor=0.25, beta=1.0),
    ],
    ids=str,
)
def test_each_objective_is_its_definition_target_by_target(changes, monkeypatch):
    monkeypatch.setattr(teacher, "CHUNK_BYTES", 4 * 97 * 3)
    o = objective(**changes)
    labels, segments = chats()
    states, hidden, weight = states_of()
    with torch.no_grad():  # half of the drafts right, so that prefix weights are of both kinds
        for k, target in enumerate(step_targets(labels, segments, 3)):
            for b, p in (target != IGNORE).nonzero().tolist():
                if (p + k) % 2:
                    states[k][b, p] = 1.5 * weight[target[b, p]]
    copies = [state.detach().clone().requires_grad_() for state in states]
    found, steps = mtp_loss(states, hidden, weight, labels, segments, o, None)
    wanted = loop(copies, hidden, weight, labels, segments, o)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found.backward()
    wanted.backward()
    for state, copy in zip(states, copies, strict=True):
        torch.testing.assert_close(state.grad, copy.grad, rtol=1e-4, atol=1e-5)
    assert [len(x) for x in steps] == [int((t != IGNORE).sum()) for t in step_targets(labels, segments, 3)]


def test_prefix_weights_by_hand():
    """One answer of six tokens: where the first draft is wrong, later steps of that anchor count a tenth."""
    weight = torch.eye(8)
    labels = torch.tensor([[IGNORE, 1, 2, 3, 4, 5]])
    right, wrong = 9 * torch.eye(8), 9 * torch.eye(8).roll(1, 0)
    # anchors 0..3 at step 1 aim at tokens 2..5, anchors 0..2 at step 2 at tokens 3..5
    first = torch.stack([right[2], wrong[3], right[4], right[5], right[0], right[0]])[None].requires_grad_()
    second = torch.zeros(1, 6, 8, requires_grad=True)
    loss, _ = mtp_loss(
        [first, second],
        first.detach(),
        weight,
        labels,
        torch.ones_like(labels),
        objective(beta=1.0, prefix_floor=0.1),
        1,
    )
    loss.backward()
    sizes = second.grad[0].norm(dim=1)
    torch.testing.assert_close(sizes[:3] / sizes[0], torch.tensor([1.0, 0.1, 1.0]))
    assert not second.grad[0, 3:].any()


def test_later_steps_reuse_the_one_pass_over_the_backbone(monkeypatch):
    """Rows of the backbone's states that are multiplied with lm_head: those of step 1's targets, once."""
    labels, segments = chats()
    states, hidden, weight = states_of()
    rows = 0
    plain = teacher.likeliest

    def counted(x, *rest):
        nonlocal rows
        rows += len(x)
        return plain(x, *rest)

    monkeypatch.setattr("fastmtp.head.losses.likeliest", counted)
    mtp_loss(states, hidden, weight, labels, segments, objective(labels="kl"), None)
    assert rows == int((step_targets(labels, segments, 1)[0] != IGNORE).sum())


def test_no_product_holds_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(teacher, "CHUNK_BYTES", 4 * VOCAB * 8)
    weight, hidden, backbone = inputs()
    largest, plain = 0, F.linear

    def watched(x, w):
        nonlocal largest
        out = plain(x, w)
        largest = max(largest, len(out))
        return out

    monkeypatch.setattr(teacher.F, "linear", watched)
    soft_cross_entropy(hidden.requires_grad_(), weight, *likeliest(backbone, weight, 5))
    assert largest == 8


def test_no_rows_and_a_trained_matrix():
    weight, hidden, _ = inputs()
    none = torch.zeros(0, 3, dtype=torch.int64)
    losses, drafts = soft_cross_entropy(hidden[:0].requires_grad_(), weight, none, none.float())
    assert losses.shape == drafts.shape == (0,)
    with pytest.raises(ValueError, match="frozen"):
        soft_cross_entropy(
            hidden, weight.requires_grad_(), torch.zeros(ROWS, 1, dtype=torch.int64), torch.ones(ROWS, 1)
        )


@pytest.mark.parametrize(
    "name, value",
    [
        ("beta", 0),
        ("beta", "x"),
        ("labels", "soft"),
        ("top_k", 0),
        ("prefix_floor", 1.5),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"mtp_{name}"):
        objective(**{name: value})
