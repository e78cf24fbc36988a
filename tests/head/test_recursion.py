"""The recursion against slow programs that share no code with it: the engine's draft loop, and the paper's
formula.
"""

import math

import pytest
import torch
from helpers.tiny import tiny_model
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from fastmtp.head.recursion import layout, recurse

LENGTH = 12
PREFIX = "model.mtp_layers.0."


class SlowHead:
    """The head as design: one vector at a time, on the checkpoint's tensors, with nothing but elementary
    maths.
    """

    def __init__(self, net):
        self.w = {n.removeprefix(PREFIX): t for n, t in net.state_dict().items() if n.startswith(PREFIX)}
        self.eps, self.theta = net.config.rms_norm_eps, net.config.rope_parameters["rope_theta"]
        self.heads, self.groups = net.config.num_attention_heads, net.config.num_key_value_heads

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.w[f"{name}.weight"] * x / torch.sqrt((x * x).mean() + self.eps)

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Pairs (x_i, x_{i + D/2}) turned by position * theta^(-2i/D)."""
        half = x.shape[0] // 2
        y = x.clone()
        for i in range(half):
            angle = position * self.theta ** (-2 * i / x.shape[0])
            y[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
            y[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
        return y

    def project(self, x: Tensor, name: str, count: int) -> list[Tensor]:
        return list(
            (self.w[f"self_attn.{name}_proj.weight"] @ x + self.w[f"self_attn.{name}_proj.bias"]).chunk(count)
        )

    def enter(self, hidden: Tensor, embed: Tensor, position: int):
        """(u, queries, keys, values) of one position."""
        both = torch.cat([self.norm(hidden, "hidden_layernorm"), self.norm(embed, "token_layernorm")])
        u = self.w["input_proj.weight"] @ both
        x = self.norm(u, "input_layernorm")
        queries = [self.rotate(q, position) for q in self.project(x, "q", self.heads)]
        keys = [self.rotate(k, position) for k in self.project(x, "k", self.groups)]
        return u, queries, keys, self.project(x, "v", self.groups)

    def leave(
        self, u: Tensor, queries: list[Tensor], seen: list[tuple[list[Tensor], list[Tensor]]]
    ) -> Tensor:
        """Attend to `seen`, one (keys, values) a position, and finish the layer."""
        outputs = []
        for number, q in enumerate(queries):
            group = number // (self.heads // self.groups)
            scores = torch.stack([q @ keys[group] / math.sqrt(len(q)) for keys, _ in seen])
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            outputs.append(sum(w * values[group] for w, (_, values) in zip(weights, seen, strict=True)))
        x = u + self.w["self_attn.o_proj.weight"] @ torch.cat(outputs)
        y = self.norm(x, "post_attention_layernorm")
        gate, up = self.w["mlp.gate_proj.weight"] @ y, self.w["mlp.up_proj.weight"] @ y
        x = x + self.w["mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
        return self.norm(x, "final_layernorm")


def draft_loop(net, ids: Tensor, num_steps: int) -> list[list[Tensor]]:
    """logits[p][k-1] of an engine that has read x_0..x_{p+1} and drafts on, always told the true token."""
    slow = SlowHead(net)
    hidden = net.model(ids[None]).last_hidden_state[0]
    embed = net.model.embed_tokens.weight[ids]
    result = []
    for anchor in range(len(ids) - num_steps):
        seen = []
        for p in range(anchor + 1):  # committed positions: the backbone's states, true next tokens
            token = embed[p + 1] if p else torch.zeros_like(embed[0])
            u, queries, keys, values = slow.enter(hidden[p], token, p)
            seen.append((keys, values))
        g = slow.leave(u, queries, seen)
        found = [net.lm_head.weight @ g]
        for k in range(2, num_steps + 1):  # in flight: the head's own state, at the next position
            u, queries, keys, values = slow.enter(g, embed[anchor + k], anchor + k - 1)
            seen.append((keys, values))
            g = slow.leave(u, queries, seen)
            found.append(net.lm_head.weight @ g)
        result.append(found)
    return result


def paper_formula(net, ids: Tensor, num_steps: int) -> list[Tensor]:
    """Section 2.1 read literally: one causal layer a step, ids rolled by k, the same mask and positions
    0..T-1.
    """
    length = ids.shape[1]
    layer = Qwen2DecoderLayer(net.config, 0).to(ids.device, net.lm_head.weight.dtype).eval()
    head = net.head
    layer.load_state_dict(
        {n: t for n, t in head.state_dict().items() if n in layer.state_dict()}, strict=True
    )
    mask = torch.full((length, length), float("-inf"), dtype=net.lm_head.weight.dtype).triu(1)[None, None]
    positions = torch.arange(length)[None]
    h = net.model(ids).last_hidden_state
    result = []
    for k in range(1, num_steps + 1):
        e = net.model.embed_tokens(ids.roll(-k, dims=1))
        if k == 1:
            e[:, 0] = 0
        u = head.input_proj(torch.cat([head.hidden_layernorm(h), head.token_layernorm(e)], -1))
        z = layer(
            u,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=net.model.rotary_emb(u, positions),
        )
        h = head.final_layernorm(z[0] if isinstance(z, tuple) else z)
        result.append(net.lm_head(h))
    return result


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (1, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5])
@torch.no_grad()
def test_exact_is_the_engines_draft_loop(ids, num_steps, dtype):
    net = tiny_model(1, dtype, spread=0.15)
    reference = draft_loop(tiny_model(1, torch.float64, spread=0.15), ids[0], num_steps)
    _, states, _ = net.mtp_states(ids, num_steps=num_steps, attention="exact")
    assert len(states) == num_steps and len(reference) == LENGTH - num_steps
    for anchor, steps in enumerate(reference):
        for k, wanted in enumerate(steps):
            found = net.lm_head(states[k][0, anchor]).double()
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=f"p={anchor} k={k + 1}")


@pytest.mark.parametrize("num_steps", [1, 3, 5])
@torch.no_grad()
def test_paper_is_the_formula(ids, num_steps):
    net = tiny_model(2, torch.float64, spread=0.15)
    _, states, _ = net.mtp_states(ids, num_steps=num_steps, attention="paper")
    for k, (state, wanted) in enumerate(zip(states, paper_formula(net, ids, num_steps), strict=True), 1):
        last = LENGTH - k  # beyond it the roll wraps round, and there is no target
        torch.testing.assert_close(net.lm_head(state)[:, :last], wanted[:, :last], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_modes_agree_at_step_one_and_at_the_first_anchor_only(ids):
    net = tiny_model(3, spread=0.15)
    paper, exact = (net.mtp_states(ids, num_steps=3, attention=mode)[1] for mode in ("paper", "exact"))
    torch.testing.assert_close(paper[0], exact[0])
    assert all((p[:, 1:] - e[:, 1:]).abs().amax() > 1e-2 for p, e in zip(paper[1:], exact[1:], strict=True))


@torch.no_grad()
def test_the_backbone_state_is_the_one_the_output_matrix_reads(ids):
    net = tiny_model(3, spread=0.15)
    hidden, _, _ = net.mtp_states(ids, num_steps=1)
    torch.testing.assert_close(net.lm_head(hidden), net(input_ids=ids).logits)


@pytest.mark.parametrize("attention", ["paper", "exact"])
@torch.no_grad()
def test_position_zero_does_not_see_its_token_and_the_others_do(ids, attention):
    """x_1 is a token of position 0's first step alone: as an embedding it must not matter to g^1_0."""
    net = tiny_model(4, spread=0.15)
    hidden = net.model(ids).last_hidden_state
    positions, segments = layout(ids.shape, ids.device, None, None)

    def run(tokens: Tensor) -> list[Tensor]:
        return recurse(
            net.head, net.rope, hidden, net.model.embed_tokens(tokens), positions, segments, 2, attention
        )

    before = run(ids)
    for place in (1, 2, 5):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 97
        first, second = run(changed)
        moved = (first - before[0]).abs().amax(-1)[0] > 1e-6
        assert moved.tolist() == [place > 1 and p >= place - 1 for p in range(LENGTH)]
        if place == 2:  # the second step of anchor 0 is at position 1 and does see its token
            assert (second - before[1])[0, 0].abs().amax() > 1e-4


@pytest.mark.parametrize("attention", ["paper", "exact"])
@torch.no_grad()
def test_no_step_sees_the_token_it_predicts(ids, attention):
    net = tiny_model(6, spread=0.15)
    _, before, _ = net.mtp_states(ids, num_steps=3, attention=attention)
    for p in range(LENGTH - 4):
        for k in (1, 2, 3):
            changed = ids.clone()
            changed[0, p + k + 1 :] = (changed[0, p + k + 1 :] + 1) % 97
            _, after, _ = net.mtp_states(changed, num_steps=3, attention=attention)
            torch.testing.assert_close(after[k - 1][0, p], before[k - 1][0, p], rtol=1e-5, atol=1e-5)


def test_bad_settings_are_refused(ids):
    net = tiny_model()
    with pytest.raises(ValueError, match="attention"):
        net.mtp_states(ids, attention="casual")
    for steps in (0, -1):
        with pytest.raises(ValueError, match="num_steps"):
            net.mtp_states(ids, num_steps=steps)


@pytest.mark.parametrize("attention", ["paper", "exact"])
def test_recomputing_a_step_changes_no_gradient(ids, attention):
    net = tiny_model().train()
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    labels = ids.clone()
    found = []
    for recompute in (False, True):
        net.zero_grad()
        if recompute:
            net.gradient_checkpointing_enable()
        net.config.mtp_attention = attention
        net(input_ids=ids, labels=labels).loss.backward()
        found.append([p.grad.clone() for p in net.head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(g.abs().sum() > 0 for g in found[0])
