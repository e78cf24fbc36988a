"""The model card of an exported folder: README.md with what is known of its base, head and training.

What nothing on this machine records is left out. The last line holds a hash of the lines above it: a card
that somebody edited is theirs, and is never replaced.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fastmtp.cli import InputError
from fastmtp.inputs import read_json

README = "README.md"
SEAL = "<!-- written by fastmtp.export, {}; a card with other words is kept -->\n"
TRAINING = ("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_ratio", "seed")
TRAINING += ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing_length")
STATES = {
    "post_norm": "The head takes the backbone's state after its final norm. SGLang hands that over, and so\n"
    "  does vLLM with this project's plugin; vLLM without it drafts worse, without a warning.",
    "pre_norm": "The head takes the backbone's state before its final norm, which vLLM's own MiMo gives.\n"
    "  SGLang hands over the state after it, and drafts worse, without a warning.",
}
TEXT = """# {title}

{base} with one multi-token-prediction head that drafts several tokens per pass
(FastMTP, [arXiv 2509.18362](https://arxiv.org/abs/2509.18362)). The base's own weights are unchanged, so the
text is the base's: an engine keeps of each draft only what the model itself would have said.

{table}

## Serve

    python -m fastmtp.serve --model MODEL --num-steps 3

`--engine vllm` serves it with vLLM and `--token-map` drafts from fewer tokens. With SGLang alone:

    python -m sglang.launch_server --model-path {model} --speculative-algorithm EAGLE \\
        --speculative-num-steps {steps} --speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens}

## Limits

- Greedy text is the base's token for token in float32. In bfloat16 nearly equal tokens may change places, as
  they do with any other batch size.
- How many drafts are accepted depends on the text: prompts unlike the training data get fewer, and so does a
  base that was fine-tuned after the head was trained.
- {state}

"""


def facts(base: Path, head: Path, state: str) -> dict[str, object]:
    """What the records beside a base and a checkpoint say: `base` (a name, or None), `base_model` (its hub
    name, or None), `rows` of the table, `steps` that the head was trained for (3 if unknown), `state`.
    """
    source = _config(base / "run.json")
    rows: dict[str, object] = {}
    if source.get("repo"):
        rows |= {"base": source["repo"], "base's revision": source.get("revision")}
    checkpoint = head.resolve()
    recipe = _config(checkpoint.parent / "run.json") if (checkpoint / "trainer_state.json").is_file() else {}
    if recipe:
        data = recipe.get("dataset") or []
        names = [Path(str(name)).name for name in (data if isinstance(data, list) else [data])]
        own = {k: v for k, v in (recipe.get("model_kwargs") or {}).items() if not k.startswith("mtp_eval")}
        rows |= {"trained on": ", ".join(names), "head's settings": _words(own)}
        rows["training"] = _words({name: recipe[name] for name in TRAINING if name in recipe})
        rows |= _tau(read_json(checkpoint / "trainer_state.json"), own.get("mtp_num_steps"))
    steps = (recipe.get("model_kwargs") or {}).get("mtp_num_steps", 3)
    name = source.get("repo")
    return {"base": rows.get("base"), "base_model": name, "rows": rows, "steps": steps, "state": state}


def _config(record: Path) -> dict:
    """The `config` of a run.json; {} without one."""
    try:
        config = read_json(record).get("config")
    except InputError:
        return {}
    return config if isinstance(config, dict) else {}


def _words(values: dict) -> str:
    return ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in values.items())


def _tau(state: dict, steps: object) -> dict[str, str]:
    """tau and the drafts' rates at the checkpoint's step, if training measured them."""
    step = state.get("global_step")
    rows = {"optimiser steps": str(step)}
    for row in state.get("log_history", []):
        if "eval_tau" in row and row.get("step") == step:
            rates = " ".join(f"{row[key]:.3f}" for key in sorted(row) if key.startswith("eval_rate_"))
            text = f"{row['eval_tau']:.3f} tokens per verify pass on held-out answers, K={steps}"
            rows |= {"accept length (tau)": text, "share of passes that accept draft k": rates}
    return rows


def card(known: dict[str, object], title: str, model: str) -> str:
    """README.md of a folder; `model` is what its commands name. `known`: see `facts`."""
    front = ["---", *([f"base_model: {known['base_model']}"] if known["base_model"] else [])]
    front += ["library_name: transformers", "pipeline_tag: text-generation"]
    front += ["tags:", *(f"- {tag}" for tag in ("fastmtp", "multi-token-prediction", "speculative-decoding"))]
    rows = [f"| {name} | {text} |" for name, text in known["rows"].items() if text]
    text = "\n".join([*front, "---", ""]) + TEXT.format(
        title=title,
        base=known["base"] or "A model",
        table="\n".join(["| | |", "|---|---|", *rows]) if rows else "Nothing is recorded of its training.",
        model=model,
        steps=known["steps"],
        tokens=int(known["steps"]) + 1,
        state=STATES[known["state"]],
    )
    text = text.replace("--model MODEL --num-steps 3", f"--model {model} --num-steps {known['steps']}")
    return text + SEAL.format(_seal(text))


def untouched(text: str) -> bool:
    """Whether a card is as this module wrote it."""
    above, _, last = text.rstrip("\n").rpartition("\n")
    return last + "\n" == SEAL.format(_seal(above + "\n"))


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
