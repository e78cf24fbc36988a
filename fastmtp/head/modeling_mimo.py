"""MiMo: a Qwen2 decoder with one multi-token-prediction layer, on stock transformers classes.

Weight names are those of the released MiMo-7B checkpoints (`model.mtp_layers.0.*`). With `labels`, `forward`
gives the FastMTP loss of the head over K recursive steps; the backbone's own next-token logits are then never
computed. Without labels it is an ordinary causal language model (generation, verification).

The files of this folder are also saved beside an exported checkpoint (`trust_remote_code=True`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2MLP,
    Qwen2Model,
    Qwen2RMSNorm,
    apply_rotary_pos_emb,
)

from .losses import Objective, mtp_loss
from .recursion import layout, recurse
from .varlen import Documents, documents, flash_usable, packed_attention

HIDDEN = ("post_norm", "pre_norm")  # the state after the final norm (SGLang), or before it (vLLM's MiMo)
VARLEN = f"{__name__}.varlen"  # a copy of this file beside a checkpoint registers its own


class MiMoConfig(Qwen2Config):
    """Qwen2's configuration, the number of MTP layers, and how the head is trained (recursion.py, losses.py).

    mtp_num_steps: recursive steps K; mtp_attention: paper | exact; mtp_hidden: HIDDEN, the backbone's state
    that the head is fed with; the others: losses.Objective. Defaults are the paper's loss on `exact`
    attention, with the state that SGLang hands over.
    """

    model_type = "mimo"
    num_nextn_predict_layers: int = 1
    mtp_num_steps: int = 3
    mtp_attention: str = "exact"
    mtp_hidden: str = "post_norm"
    mtp_beta: float = 0.6
    mtp_labels: str = "data"
    mtp_top_k: int = 64
    mtp_prefix_floor: float = 1.0

    @property
    def objective(self) -> Objective:
        """What is learnt. ValueError for a setting out of range."""
        if self.mtp_hidden not in HIDDEN:
            raise ValueError(f"mtp_hidden must be one of {', '.join(HIDDEN)}, not {self.mtp_hidden}")
        return Objective(**{field.name: getattr(self, f"mtp_{field.name}") for field in fields(Objective)})


# the keys of a recipe's `model_kwargs`, and their kinds
SETTINGS = {field.name: type(field.default) for field in fields(MiMoConfig) if field.name.startswith("mtp_")}


def varlen_attention(module, query, key, value, attention_mask, cu_seq_lens_q, max_length_q, **_):
    """transformers' attention interface over packed documents: [B, Hq, T, D] -> [B, T, Hq, D], no weights."""
    context = packed_attention(query, key, value, [], Documents(cu_seq_lens_q, max_length_q))
    return context.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)


@contextmanager
def attention_of(config: Qwen2Config, name: str) -> Iterator[None]:
    """The layers built on `config` use the attention `name` for a while."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass
class MTPLossOutput(CausalLMOutputWithPast):
    """`loss` is the weighted scalar; `step_losses`: K tensors [N_k], the token losses of each step."""

    step_losses: list[Tensor] | None = None


class MiMoMTPLayer(nn.Module):
    """One Qwen2 decoder layer fed with two normalised streams, cut at its attention (see recursion.Head)."""

    def __init__(self, config: MiMoConfig):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.token_layernorm = Qwen2RMSNorm(width, eps=eps)
        self.hidden_layernorm = Qwen2RMSNorm(width, eps=eps)
        self.input_proj = nn.Linear(2 * width, width, bias=False)
        self.input_layernorm = Qwen2RMSNorm(width, eps=eps)
        self.self_attn = Qwen2Attention(config, layer_idx=0)
        self.post_attention_layernorm = Qwen2RMSNorm(width, eps=eps)
        self.mlp = Qwen2MLP(config)
        self.final_layernorm = Qwen2RMSNorm(width, eps=eps)

    def fuse(self, hidden: Tensor, embeds: Tensor) -> Tensor:
        """[B, T, H] x 2 -> [B, T, H]; hidden first, as MiMo does (DeepSeek's order is the other one)."""
        return self.input_proj(
            torch.cat([self.hidden_layernorm(hidden), self.token_layernorm(embeds)], dim=-1)
        )

    def qkv(self, fused: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, Hq, T, D], k and v [B, Hkv, T, D] of the layer's attention."""
        x = self.input_layernorm(fused)
        shape = (*x.shape[:2], -1, self.self_attn.head_dim)
        q, k, v = (
            projection(x).view(shape).transpose(1, 2)
            for projection in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))
        return q, k, v

    def finish(self, fused: Tensor, context: Tensor) -> Tensor:
        """Attention output [B, Hq, T, D] -> g [B, T, H], after the final norm."""
        x = fused + self.self_attn.o_proj(context.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.post_attention_layernorm(x))
        return self.final_layernorm(x)


class MiMoModel(Qwen2Model):
    config_class = MiMoConfig

    def __init__(self, config: MiMoConfig):
        super().__init__(config)
        if config.num_nextn_predict_layers != 1:
            raise ValueError(f"num_nextn_predict_layers must be 1, not {config.num_nextn_predict_layers}")
        self.mtp_layers = nn.ModuleList([MiMoMTPLayer(config)])
        self.post_init()


class MiMoForCausalLM(Qwen2ForCausalLM):
    config_class = MiMoConfig

    def __init__(self, config: MiMoConfig):
        super(Qwen2ForCausalLM, self).__init__(config)  # Qwen2's own __init__ would build the backbone twice
        self.model = MiMoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute = False
        self.post_init()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """The head's steps are computed again in the backward pass. The frozen backbone keeps no graph to
        save.
        """
        self.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        self.recompute = False

    @property
    def head(self) -> MiMoMTPLayer:
        return self.model.mtp_layers[0]

    def compile_layers(self) -> None:
        """torch.compile each backbone layer and the head's three parts, for any number of tokens.

        Attention over documents is left to its kernel. Costs most of a minute, once a machine.
        """
        for layer in self.model.layers:
            layer.compile(dynamic=True)
        for name in ("fuse", "qkv", "finish"):
            setattr(self.head, name, torch.compile(getattr(self.head, name), dynamic=True))

    def load_head(self, tensors: dict[str, Tensor]) -> None:
        """Replace the head by `tensors` (full checkpoint names), cast to its dtype. KeyError/RuntimeError if
        they differ.
        """
        prefix = "model.mtp_layers.0."
        self.head.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, strict=True
        )

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [B, T, D] float32 for positions [B, T]."""
        return self.model.rotary_emb(torch.empty(0, device=positions.device), positions)

    def backbone(self, **inputs) -> tuple[Tensor, Tensor]:
        """(states after the final norm, the states that the head is fed with), both [B, T, H]."""
        entering: list[Tensor] = []  # the final norm
        hook = self.model.norm.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
        try:
            hidden = self.model(**inputs).last_hidden_state
        finally:
            hook.remove()
        return hidden, hidden if self.config.mtp_hidden == "post_norm" else entering[0]

    def mtp_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_steps: int | None = None,
        attention: str | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Backbone states after the final norm [B, T, H], the head's states of each step (K x [B, T, H]) and
        the segments [B, T].

        input_ids: [B, T]; `num_steps` and `attention` default to the configuration. The backbone runs without
        gradients unless something in it is trained.
        """
        frozen = not any(
            p.requires_grad for n, p in self.model.named_parameters() if not n.startswith("mtp_layers.")
        )
        positions, segments = layout(input_ids.shape, input_ids.device, attention_mask, position_ids)
        with torch.no_grad() if frozen else nullcontext():
            embeds = self.model.embed_tokens(input_ids)
            if frozen:  # gradient checkpointing's hook asks for a gradient that nobody needs
                embeds = embeds.detach()
            where = None
            if flash_usable(embeds) and not self.model.has_sliding_layers:
                where = documents(segments)
                with attention_of(self.config, VARLEN):
                    hidden, fed = self.backbone(
                        inputs_embeds=embeds,
                        attention_mask={"full_attention": None},
                        position_ids=positions,
                        use_cache=False,
                        cu_seq_lens_q=where.starts,
                        max_length_q=where.longest,
                    )
            else:
                hidden, fed = self.backbone(
                    inputs_embeds=embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    use_cache=False,
                )
        states = recurse(
            self.head,
            self.rope,
            fed,
            embeds,
            positions,
            segments,
            num_steps if num_steps is not None else self.config.mtp_num_steps,
            attention or self.config.mtp_attention,
            where,
            recompute=self.recompute and self.training,
        )
        return hidden, states, segments

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """With `labels` [B, T]: the FastMTP loss (MTPLossOutput, no logits). Without: Qwen2's forward.

        Raises ValueError for labels together with `logits_to_keep`, which would drop the targets between
        turns.
        """
        if labels is None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
            raise ValueError("the head needs whole sequences: set `use_logits_to_keep: false` in the recipe")
        hidden, states, segments = self.mtp_states(input_ids, attention_mask, position_ids)
        loss, step_losses = mtp_loss(
            states, hidden, self.lm_head.weight, labels, segments, self.config.objective, num_items_in_batch
        )
        return MTPLossOutput(loss=loss, step_losses=step_losses)


def register() -> None:
    """Teach transformers' Auto classes the model type `mimo`."""
    AutoConfig.register("mimo", MiMoConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM, exist_ok=True)


register()
