"""The throughput benchmark: both ways learn the same thing from the same documents, and its operations are
countable.
"""

import pytest
import torch
from helpers import tiny
from helpers.tiny import tiny_model

from benchmarks import train_throughput as bench

SHAPE = tiny.SHAPE | dict(head_dim=16, rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=4096)


def test_packing_keeps_every_token_in_order():
    documents = bench.make_documents(40, 97, 0)
    lengths = [len(ids) for ids, _ in documents]
    assert min(lengths) >= 32 and max(lengths) <= 4096 and documents[3][1][: lengths[3] // 4].eq(-100).all()
    rows = bench.pack(documents, 4096)
    assert torch.equal(
        torch.cat([row["input_ids"][0] for row in rows]), torch.cat([ids for ids, _ in documents])
    )
    assert all(row["input_ids"].shape[1] <= 4096 for row in rows)
    assert sum(int((row["position_ids"] == 0).sum()) for row in rows) == 40


def test_the_paper_style_loss_and_gradients_are_ours_on_one_document():
    net = tiny_model(5, spread=0.15, mtp_attention="paper", mtp_num_steps=3)
    net.head.requires_grad_(True)
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :10] = -100
    theirs = bench.paper_style_loss(net, ids, labels)
    theirs.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in net.head.named_parameters()}
    # each step's mean is over its own targets there, over all answer tokens here
    steps = net(input_ids=ids, labels=labels).step_losses
    alphas = bench.step_weights(3, 0.6)
    torch.testing.assert_close(theirs.detach(), sum(a * s.mean() for a, s in zip(alphas, steps, strict=True)))
    assert all(gradient.abs().max() > 0 for gradient in wanted.values())


def test_useful_operations_by_hand():
    ids = torch.arange(10)
    labels = torch.where(ids >= 4, ids, -100)
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 80
    pairs = 4 * 64 * 55
    # step 1 has targets x_5..x_9 (anchors 3..7), step 2 x_6..x_9, so 5 and 4 of 10
    backbone = 2 * (2 * layer * 10 + pairs)
    head = 3 * (1 + 0.4) * (2 * (layer + 2 * 64 * 64) * 10 + pairs)
    assert bench.useful_operations(SHAPE, [(ids, labels)], 2) == pytest.approx(
        backbone + head + 4 * 64 * 97 * 9
    )


def test_the_command_writes_figures_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "smollm2", SHAPE)
    monkeypatch.setattr(bench, "matrix_rate", lambda device: 1e12)
    bench.main(
        ["--shape", "smollm2", "--documents", "2", "--num-steps", "2", "--out", str(tmp_path / "x.json")]
    )
    assert capsys.readouterr().out.count("tokens_per_second") == 2
    text = (tmp_path / "x.md").read_text()
    assert "| ours |" in text and "| paper-style |" in text and "--documents 2" in text
    flash = ["--impl", "flash-attn", "--shape", "smollm2"]
    for wrong in (["--packed-length", "100"], ["--documents", "0"], ["--shape", "mimo-7b"], flash):
        with pytest.raises(bench.InputError, match=wrong[0]):
            bench.main(wrong)


@pytest.mark.parametrize("impl", ["ours", "paper-style"])
def test_both_train_the_head_alone(impl):
    documents = [(ids[-60:], labels[-60:]) for ids, labels in bench.make_documents(3, 97, 0)]
    row = bench.measure(impl, SHAPE, documents, 2, 4096, compiled=False, recompute=impl == "ours")
    assert row["tokens"] == sum(len(ids) for ids, _ in documents) and row["seconds"] > 0
    net = bench.build(SHAPE, 2, "cpu")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    bench.Trainer(net, impl, "cpu", recompute=False).step(bench.steps_of(impl, documents, 4096)[0])
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".mtp_layers." in name}
