"""The loss: weights, targets, chunked cross-entropy, and that batching of any kind changes nothing."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import save_folder, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtp.head import losses, teacher
from fastmtp.head.losses import IGNORE, cross_entropy, mtp_loss, step_targets, step_weights
from fastmtp.reference.model import load

VOCAB = 97


def test_step_weights_decay_and_sum_to_one():
    assert step_weights(3, 0.6) == pytest.approx([1 / 1.96, 0.6 / 1.96, 0.36 / 1.96])
    assert step_weights(1, 0.6) == [1.0] and step_weights(4, 1.0) == [0.25] * 4
    for steps, beta in ((0, 0.6), (-1, 0.6), (3, 0), (3, -1)):
        with pytest.raises(ValueError):
            step_weights(steps, beta)


@pytest.fixture(params=["whole", "chunks", "single rows"])
def chunking(request, monkeypatch):
    rows = {"whole": 1000, "chunks": 5, "single rows": 0}[request.param]
    monkeypatch.setattr(teacher, "CHUNK_BYTES", 4 * VOCAB * rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_is_the_full_one(chunking, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator)
    weight = torch.randn(VOCAB, 16, generator=generator).to(dtype)
    targets = torch.randint(0, VOCAB, (23,), generator=generator)
    upstream = torch.rand(23, generator=generator) + 0.5  # as the step weights: not the same for every row
    ours, full = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = cross_entropy(ours, weight, targets)
    wanted = F.cross_entropy(F.linear(full.to(dtype), weight).float(), targets, reduction="none")
    (found * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    assert found.dtype == torch.float32 and found.shape == (23,)
    near = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, full.grad, **near)


def test_cross_entropy_never_holds_all_logits(monkeypatch):
    """Peak of one product is the chunk's, whatever the number of rows."""
    monkeypatch.setattr(teacher, "CHUNK_BYTES", 4 * VOCAB * 8)
    largest = 0
    plain = F.linear

    def watched(x, weight):
        nonlocal largest
        out = plain(x, weight)
        largest = max(largest, out.shape[0])
        return out

    monkeypatch.setattr(losses.F, "linear", watched)
    cross_entropy(
        torch.randn(100, 16, requires_grad=True), torch.randn(VOCAB, 16), torch.zeros(100, dtype=torch.int64)
    )
    assert largest == 8


def test_cross_entropy_of_no_rows_and_a_trained_matrix():
    hidden = torch.randn(0, 16, requires_grad=True)
    found = cross_entropy(hidden, torch.randn(VOCAB, 16), torch.zeros(0, dtype=torch.int64))
    found.sum().backward()
    assert found.shape == (0,) and hidden.grad.shape == (0, 16)
    with pytest.raises(ValueError, match="frozen"):
        cross_entropy(
            torch.randn(1, 16), torch.randn(VOCAB, 16, requires_grad=True), torch.zeros(1, dtype=torch.int64)
        )


def slow_targets(labels: list[int], documents: list[int], num_steps: int) -> list[list[int]]:
    """The rule in words: x_{p+1}..x_{p+k+1} are all answers of p's own document, and p is no padding."""
    result = []
    for k in range(1, num_steps + 1):
        row = []
        for p in range(len(labels)):
            chain = range(p + 1, p + k + 2)
            fine = documents[p] > 0 and chain[-1] < len(labels)
            fine = fine and all(labels[j] != IGNORE and documents[j] == documents[p] for j in chain)
            row.append(labels[p + k + 1] if fine else IGNORE)
        result.append(row)
    return result


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=4)),
        max_size=4,
    ),
    st.integers(1, 6),
    st.integers(0, 5),
)
def test_targets_never_cross_a_turn_or_a_document(shape, num_steps, padding):
    """Documents of a prompt (or none) and turns, some of them answers, then padding: the fast form equals the
    rule.
    """
    labels, documents = [], []
    for number, (prompt, turns) in enumerate(shape, 1):
        kinds = [False] * prompt + [kind for kind, length in turns for _ in range(length)]
        labels += [len(labels) + i + 1 if kind else IGNORE for i, kind in enumerate(kinds)]
        documents += [number] * len(kinds)
    labels, documents = labels + [IGNORE] * padding, documents + [0] * padding
    if not labels:
        return
    found = step_targets(torch.tensor([labels]), torch.tensor([documents]), num_steps)
    assert [t[0].tolist() for t in found] == slow_targets(labels, documents, num_steps)


def test_targets_of_a_two_turn_chat_written_out():
    i = IGNORE
    labels = torch.tensor([[i, i, 12, 13, 14, i, i, 17, 18]])
    first, second, third = step_targets(labels, torch.ones_like(labels), 3)
    assert first.tolist() == [[i, 13, 14, i, i, i, 18, i, i]]
    assert second.tolist() == [[i, 14, i, i, i, i, i, i, i]]
    assert third.tolist() == [[i] * 9]


LENGTHS = (14, 9, 17)


def documents():
    """Three chats: (ids, labels), the last with two answers."""
    generator = torch.Generator().manual_seed(9)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[:4] = IGNORE
        if length == 17:
            labels[9:12] = IGNORE
        rows.append((ids, labels))
    return rows


def single(rows):
    return [dict(input_ids=ids[None], labels=labels[None]) for ids, labels in rows]


def padded(rows, left: bool):
    length = max(LENGTHS)
    ids, mask = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(2))
    labels = torch.full_like(ids, IGNORE)
    for row, (tokens, wanted) in enumerate(rows):
        place = slice(length - len(tokens), length) if left else slice(0, len(tokens))
        ids[row, place], labels[row, place], mask[row, place] = tokens, wanted, 1
    return [dict(input_ids=ids, labels=labels, attention_mask=mask)]


def packed(rows):
    return [
        dict(
            input_ids=torch.cat([ids for ids, _ in rows])[None],
            labels=torch.cat([labels for _, labels in rows])[None],
            position_ids=torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
        )
    ]


def loss_and_gradients(net, batches):
    """Losses and head gradients summed over the batches of one optimiser step."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("model.mtp_layers."))
    net.zero_grad()
    items = sum(int((labels[1:] != IGNORE).sum()) for _, labels in documents())
    loss, counts = 0.0, None
    for batch in batches:
        out = net(**batch, num_items_in_batch=items)
        out.loss.backward()
        loss += out.loss.item()
        steps = torch.tensor([[x.numel(), x.sum()] for x in out.step_losses])
        counts = steps if counts is None else counts + steps
    return loss, counts, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "settings",
    [
        dict(mtp_attention="paper"),
        dict(mtp_attention="exact"),
        dict(mtp_labels="argmax", mtp_prefix_floor=0.0),
        dict(mtp_labels="kl", mtp_top_k=9, mtp_prefix_floor=0.2),
    ],
    ids=str,
)
def test_packed_is_padded_is_single(settings):
    net = tiny_model(11, spread=0.15, mtp_num_steps=3, **settings)
    rows = documents()
    wanted_loss, wanted_steps, wanted = loss_and_gradients(net, single(rows))
    assert len(wanted) == 16 and all(g.abs().amax() > 0 for n, g in wanted.items() if "k_proj.bias" not in n)
    assert wanted_steps[:, 0].tolist() == [9 + 4 + 4 + 4, 8 + 3 + 3 + 3, 7 + 2 + 2 + 2]
    forms = {"packed": packed(rows), "right": padded(rows, False), "left": padded(rows, True)}
    for name, batches in forms.items():
        loss, steps, grads = loss_and_gradients(net, batches)
        assert loss == pytest.approx(wanted_loss, rel=1e-5), name
        torch.testing.assert_close(steps, wanted_steps, rtol=1e-5, atol=1e-5)
        assert grads.keys() == wanted.keys()
        for tensor, grad in grads.items():
            torch.testing.assert_close(grad, wanted[tensor], rtol=1e-4, atol=1e-6, msg=f"{name} {tensor}")


@pytest.mark.parametrize("attention", ["paper", "exact"])
def test_the_loss_is_the_weighted_mean_written_out(attention):
    net = tiny_model(12, spread=0.15, mtp_attention=attention, mtp_num_steps=3, mtp_beta=0.6)
    ids, labels = documents()[0]
    out = net(input_ids=ids[None], labels=labels[None])
    assert out.logits is None
    _, states, _ = net.mtp_states(ids[None])
    total = 0.0
    for k, (alpha, state) in enumerate(zip([1 / 1.96, 0.6 / 1.96, 0.36 / 1.96], states, strict=True), 1):
        anchors = range(3, len(ids) - k - 1)  # the first anchor is the prompt's last token
        wanted = sum(F.cross_entropy(net.lm_head(state[0, p]), ids[p + k + 1]) for p in anchors)
        torch.testing.assert_close(out.step_losses[k - 1].sum(), wanted)
        total += alpha * wanted
    torch.testing.assert_close(out.loss, total / (len(ids) - 4))


def test_a_batch_without_targets_gives_zero_and_zero_gradients():
    net = tiny_model(13, spread=0.15)
    ids = documents()[0][0]
    loss, _, grads = loss_and_gradients(
        net, [dict(input_ids=ids[None], labels=torch.full_like(ids, IGNORE)[None])]
    )
    assert loss == 0.0 and len(grads) == 16 and all(not g.any() for g in grads.values())


def test_labels_with_cut_logits_are_refused():
    ids, labels = documents()[0]
    with pytest.raises(ValueError, match="use_logits_to_keep"):
        tiny_model()(input_ids=ids[None], labels=labels[None], logits_to_keep=3)


def test_only_the_head_gets_gradients_and_the_backbone_no_graph():
    net = tiny_model(14, spread=0.15)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("model.mtp_layers."))
    hidden, states, _ = net.mtp_states(documents()[0][0][None])
    assert not hidden.requires_grad and all(state.requires_grad for state in states)


def test_mtp_loss_normalises_by_what_it_is_told():
    net = tiny_model(15, spread=0.15)
    ids, labels = documents()[2]
    hidden, states, segments = net.mtp_states(ids[None])
    by_own = mtp_loss(states, hidden, net.lm_head.weight, labels[None], segments, net.config.objective, None)[
        0
    ]
    by_hundred = mtp_loss(
        states, hidden, net.lm_head.weight, labels[None], segments, net.config.objective, torch.tensor(100)
    )[0]
    torch.testing.assert_close(by_own * int((labels[1:] != IGNORE).sum()), by_hundred * 100)


def test_a_checkpoint_of_older_settings_still_loads(tmp_path):
    """Keys that went with their options stay in old config.json files, and mean nothing."""
    save_folder(tmp_path / "old")
    about = json.loads((tmp_path / "old" / "config.json").read_text())
    about |= {"mtp_mean": "sequence", "mtp_temperature": 0.6}
    (tmp_path / "old" / "config.json").write_text(json.dumps(about))
    net = load(tmp_path / "old").net
    assert net.config.objective == tiny_model().config.objective
