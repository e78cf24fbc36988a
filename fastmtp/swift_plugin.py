"""Everything ms-swift needs to know to train an MTP head, through its public extension points
(`external_plugins`).

- loader: MiMo layout, head kept in float32 under bf16 autocast (in bf16 the norms' small updates round away);
- template: rows that fastmtp.train has encoded are handed on as they are; others (a hub's data sets) go
  through the model's own chat template (chat.py); per-step losses in the log, head-only checkpoints;
- callback `mtp_start_up`: how long the start took, phase by phase;
- callback `mtp_tau`: accept length on held-out samples at every checkpoint, the best one kept and linked;
- a run whose trainable set is not exactly the head stops before its first step.

Recipes give the head's settings as `model_kwargs`, which ms-swift turns into environment variables.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from swift.arguments import SftArguments
from swift.callbacks import TrainerCallback, callbacks_map
from swift.model import ModelGroup, ModelLoader, ModelMeta, register_model
from swift.template import Template, TemplateMeta, register_template
from swift.utils import append_to_jsonl
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from fastmtp.chat import encode_chat
from fastmtp.checkpoint import PREFIX, save_head
from fastmtp.data.samples import check_measurable, read_samples
from fastmtp.data.start_up import StartUp
from fastmtp.files import is_full
from fastmtp.head.modeling_mimo import SETTINGS, MiMoConfig, MiMoForCausalLM
from fastmtp.head.varlen import use_flash_attn
from fastmtp.leftovers import is_running
from fastmtp.reference.model import Model
from fastmtp.reference.teacher_forced import measure, pooled

NAME = "fastmtp_mimo"


def swift_keys() -> set[str]:
    """Names that `swift sft` accepts in a recipe."""
    return {field.name for field in dataclasses.fields(SftArguments)} | {"ENV"}


class MiMoLoader(ModelLoader):
    default_trust_remote_code = False

    def get_config(self, model_dir: str):
        self.auto_config_cls = MiMoConfig
        config = super().get_config(model_dir)
        for name, kind in SETTINGS.items():
            if name.upper() in os.environ:
                setattr(config, name, kind(os.environ[name.upper()]))
        return config

    def _update_attn_impl(self, config) -> None:
        """Recipes that pack say `attn_impl: flash_attn`, or ms-swift refuses; the model has its own attention
        over documents.
        """
        self.attn_impl = "sdpa"
        super()._update_attn_impl(config)

    def get_model(self, model_dir: str, config, processor, model_kwargs):
        self.auto_model_cls = MiMoForCausalLM
        model = super().get_model(model_dir, config, processor, model_kwargs)
        model.model.mtp_layers.float()
        if os.environ.get("MTP_COMPILE") == "True":
            model.compile_layers()
        use_flash_attn(os.environ.get("MTP_FLASH_ATTN") == "True")
        start_up.lap("model")
        return model


class MTPTemplate(Template):
    support_padding_free = True

    def encode(self, inputs, return_template_inputs: bool = False, return_length: bool = False) -> dict:
        if not isinstance(inputs, dict) or "input_ids" not in inputs:
            return super().encode(inputs, return_template_inputs, return_length)
        ids, length = list(inputs["input_ids"]), len(inputs["input_ids"])
        row = {"input_ids": ids, "labels": list(inputs["labels"]), "length": length}
        return row | ({"lengths": [length]} if return_length else {})

    def _encode(self, inputs) -> dict:
        system = [{"role": "system", "content": inputs.system}] if inputs.system else []
        ids, labels = encode_chat(self.tokenizer, system + inputs.messages)
        return {"input_ids": ids, "labels": labels, "loss_scale": None}

    def compute_sft_loss(self, model, inputs, num_items_in_batch=None, trainer=None):
        check_trainable(trainer.accelerator.unwrap_model(model))  # every time: a resumed run has no step 0
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        metrics = trainer.custom_metrics["train" if trainer.model.training else "eval"]
        for step, losses in enumerate(outputs.step_losses, 1):
            metrics[f"mtp_loss_{step}"].update(losses)
        outputs.step_losses = None
        return outputs

    gathered: dict[str, torch.Tensor] | None = None  # the head as GatherCallback left it

    def save_callback(self, model, output_dir: str) -> None:
        """Checkpoints hold the head alone; ms-swift loads them over the base on resume, fastmtp.export merges
        them. The record of what the run depends on comes first: it marks the folder as ours.
        """
        record = os.environ.get("FASTMTP_RECORD")
        if record:
            shutil.copyfile(record, Path(output_dir) / Path(record).name)
        config = getattr(model, "module", model).config
        save_head(Path(output_dir), self.gathered or head_of(model), config.mtp_hidden)


def head_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The head's tensors by name, whole and on the CPU. Where they are sharded, every rank must call it."""
    head = {n: t.detach() for n, t in model.state_dict().items() if n.startswith(PREFIX)}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).cpu().contiguous() for n, t in head.items()}


class GatherCallback(TrainerCallback):
    """For FSDP: all ranks put the head together before rank 0 writes it."""

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self.trainer.template.gathered = head_of(self.trainer.model)

    on_epoch_end = on_step_end


class StartUpCallback(TrainerCallback):
    """When the first step ends: what the start took, on the console and as a line of logging.jsonl."""

    shown = False

    def on_train_begin(self, args, state, control, **kwargs):
        start_up.lap("trainer")

    def on_step_end(self, args, state, control, **kwargs):
        if self.shown or not state.is_world_process_zero:
            return
        start_up.lap("first step")
        tqdm.write(start_up.line())
        seconds = {phase: round(value, 2) for phase, value in start_up.seconds.items()}
        append_to_jsonl(os.path.join(args.output_dir, "logging.jsonl"), {"start_up": seconds})
        self.shown = True


class TauCallback(TrainerCallback):
    """At every checkpoint: `eval_tau` and `eval_rate_k` of MTP_EVAL_DATA's first MTP_EVAL_LIMIT samples, in
    the log.

    The figures are fastmtp.acceptance's for the same samples, K and precision (under bf16 autocast the head's
    weights are float32 here and bfloat16 there). Rank 0 measures. The best checkpoint is kept whatever
    `save_total_limit`.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        plugin = trainer.accelerator.state.deepspeed_plugin
        if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise RuntimeError(
                "mtp_eval_data needs the whole model on one rank; leave it out with FSDP and ZeRO-3"
            )
        limit, path = os.environ.get("MTP_EVAL_LIMIT"), os.environ["MTP_EVAL_DATA"]
        vocab_size = self.net.config.vocab_size
        self.samples = read_samples(
            path, vocab_size, int(limit) if limit else None, trainer.template.tokenizer
        )
        check_measurable(path, self.samples)

    @property
    def net(self) -> MiMoForCausalLM:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            figures = [self.figures() if state.is_world_process_zero else None]
            if dist.is_initialized():
                dist.broadcast_object_list(figures, src=0)
            # the log of a model in training would also empty the means of the step losses
            self.trainer.model.eval()
            training_log = control.should_log  # and any log calls off the one that is due
            self.trainer.log(dict(figures[0]))
            control.should_log = training_log
            self.trainer.model.train()
            if state.best_metric is None or figures[0]["eval_tau"] > state.best_metric:
                state.best_metric, state.best_global_step = figures[0]["eval_tau"], state.global_step

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.best_model_checkpoint:
            best = Path(state.best_model_checkpoint)
            link, temporary = best.with_name("best-checkpoint"), best.with_name(".best-checkpoint.tmp")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(best.name)
            os.replace(temporary, link)

    def figures(self) -> dict[str, float]:
        net = self.net
        mixed = net.head.input_proj.weight.dtype != net.lm_head.weight.dtype
        with torch.autocast(net.lm_head.weight.device.type, torch.bfloat16, enabled=mixed):
            total = pooled(measure(Model(net, None, set()), self.samples, net.config.mtp_num_steps))
        rates = {f"eval_rate_{k}": round(rate, 4) for k, rate in enumerate(total.position_rates, 1)}
        return {"eval_tau": round(total.accept_length, 4)} | rates


def check_trainable(model: torch.nn.Module) -> None:
    """RuntimeError unless exactly the head's parameters require gradients."""
    wrong = [n for n, p in model.named_parameters() if p.requires_grad != n.startswith(PREFIX)]
    if wrong:
        raise RuntimeError(
            f"the trainable set must be exactly {PREFIX}*, but {wrong[0]} and {len(wrong) - 1} others "
            "differ; set freeze_parameters: [model, lm_head] and trainable_parameters: [model.mtp_layers]"
        )


def end_with(parent: int) -> None:
    """End this process once `parent` is gone: a killed command must not leave a training behind."""

    def watch() -> None:
        while is_running(parent):
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_full_disks(output: Path) -> None:
    """End with code ENOSPC, not a traceback, if the disk of `output` is full: fastmtp.train says so.

    torch.save loses the system's reason; what is left on the disk tells.
    """

    def hook(kind, error, trace) -> None:
        if is_full(error) or (isinstance(error, RuntimeError) and shutil.disk_usage(output).free < 1 << 16):
            os._exit(errno.ENOSPC)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


if "FASTMTP_PARENT" in os.environ:
    end_with(int(os.environ["FASTMTP_PARENT"]))
    leave_full_disks(Path(os.environ["FASTMTP_RECORD"]).parent)
start_up = StartUp.taken()
callbacks_map["mtp_start_up"] = StartUpCallback
callbacks_map["mtp_tau"] = TauCallback
callbacks_map["mtp_gather"] = GatherCallback
register_template(
    TemplateMeta(NAME, prefix=[], prompt=["{{QUERY}}"], chat_sep=[], suffix=[], template_cls=MTPTemplate)
)
register_model(
    ModelMeta(NAME, [ModelGroup([])], MiMoLoader, template=NAME, architectures=["MiMoForCausalLM"]),
    exist_ok=True,
)
