"""Everything ms-swift needs to know to train an MTP head, through its public extension points (`external_plugins`).

- loader: MiMo layout, head kept in float32 under bf16 autocast (in bf16 the norms' small updates round away);
- template: the model's own chat template (chat.py), per-step losses in the log, head-only checkpoints;
- a run whose trainable set is not exactly the head stops before its first step.

Recipes set K, beta and the attention with `model_kwargs: {mtp_num_steps, mtp_beta, mtp_attention}`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from swift.arguments import SftArguments
from swift.model import ModelGroup, ModelLoader, ModelMeta, register_model
from swift.template import Template, TemplateMeta, register_template

from fastmtp.chat import encode_chat
from fastmtp.export import PREFIX
from fastmtp.modeling_mimo import MiMoConfig, MiMoForCausalLM

NAME = "fastmtp_mimo"
SETTINGS = {"mtp_num_steps": int, "mtp_beta": float, "mtp_attention": str}


def swift_keys() -> set[str]:
    """Names that `swift sft` accepts in a recipe."""
    return {field.name for field in dataclasses.fields(SftArguments)} | {"ENV"}


class MiMoLoader(ModelLoader):
    default_trust_remote_code = False

    def get_config(self, model_dir: str):
        self.auto_config_cls = MiMoConfig
        config = super().get_config(model_dir)
        for name, kind in SETTINGS.items():  # ms-swift turns model_kwargs into environment variables
            if name.upper() in os.environ:
                setattr(config, name, kind(os.environ[name.upper()]))
        return config

    def get_model(self, model_dir: str, config, processor, model_kwargs):
        self.auto_model_cls = MiMoForCausalLM
        model = super().get_model(model_dir, config, processor, model_kwargs)
        model.model.mtp_layers.float()
        return model


class MTPTemplate(Template):
    support_padding_free = True

    def _encode(self, inputs) -> dict:
        system = [{"role": "system", "content": inputs.system}] if inputs.system else []
        ids, labels = encode_chat(self.tokenizer, system + inputs.messages)
        return {"input_ids": ids, "labels": labels, "loss_scale": None}

    def compute_sft_loss(self, model, inputs, num_items_in_batch=None, trainer=None):
        if trainer.state.global_step == 0:
            check_trainable(trainer.accelerator.unwrap_model(model))
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        metrics = trainer.custom_metrics["train" if trainer.model.training else "eval"]
        for step, losses in enumerate(outputs.step_losses, 1):
            metrics[f"mtp_loss_{step}"].update(losses)
        outputs.step_losses = None
        return outputs

    def save_callback(self, model, output_dir: str) -> None:
        """Checkpoints hold the head alone; ms-swift loads them over the base on resume, fastmtp.export merges them."""
        head = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n.startswith(PREFIX)}
        save_file(head, Path(output_dir) / "model.safetensors", metadata={"format": "pt"})


def check_trainable(model: torch.nn.Module) -> None:
    """RuntimeError unless exactly the head's parameters require gradients."""
    wrong = [n for n, p in model.named_parameters() if p.requires_grad != n.startswith(PREFIX)]
    if wrong:
        raise RuntimeError(
            f"the trainable set must be exactly {PREFIX}*, but {wrong[0]} and {len(wrong) - 1} others differ; "
            "set freeze_parameters: [model, lm_head] and trainable_parameters: [model.mtp_layers]"
        )


register_template(TemplateMeta(NAME, prefix=[], prompt=["{{QUERY}}"], chat_sep=[], suffix=[], template_cls=MTPTemplate))
register_model(
    ModelMeta(NAME, [ModelGroup([])], MiMoLoader, template=NAME, architectures=["MiMoForCausalLM"]), exist_ok=True
)
