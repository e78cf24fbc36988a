"""Two folders for a vLLM on which our package cannot be installed: the backbone, and the model with its head.

vLLM's MiMo hands its drafter the state before the final norm; its Qwen2 hands over the state after it, which
our heads are trained on. So the backbone is served as a Qwen2, and the draft model is the folder as exported.
`num_nextn_predict_layers` stays in the backbone's config, because vLLM otherwise takes no MTP drafter for it.
The weights lie in the model's folder alone; the backbone's links to them are relative, so both move together.
"""

from __future__ import annotations

from pathlib import Path

from fastmtp import files
from fastmtp.checkpoint import CODE, CONTRACT_KEY, PREFIX
from fastmtp.formats.weights import INDEX
from fastmtp.inputs import read_json

MODEL, BACKBONE = "model", "backbone"
LEFT_OUT = {"config.json", "run.json", INDEX, *(path.name for path in CODE)}
README = """# For vLLM without the fastmtp package

Run in this folder:

    vllm serve ./backbone --speculative-config \\
        '{"method": "mtp", "model": "./model", "num_speculative_tokens": 3}'

`backbone` is the model without its head; `model` is the model with it, as `python -m fastmtp.export` writes
it. The weights are in `model` alone, and `backbone` links to them: keep both folders side by side.

Do not serve `model` by itself with a vLLM that lacks the fastmtp package: its head would get the state before
the final norm and draft worse, without a warning.
"""


def add_backbone(folder: Path) -> None:
    """Write `backbone` and README.md into `folder`, whose `model` is an exported folder with an index."""
    model, backbone = folder / MODEL, folder / BACKBONE
    backbone.mkdir()
    config = read_json(model / "config.json")
    config = {name: value for name, value in config.items() if name not in ("auto_map", CONTRACT_KEY)}
    files.write_json(backbone / "config.json", config | {"architectures": ["Qwen2ForCausalLM"]})
    index = read_json(model / INDEX)
    kept = {name: file for name, file in index["weight_map"].items() if not name.startswith(PREFIX)}
    size = sum((model / file).stat().st_size for file in set(kept.values()))
    files.write_json(backbone / INDEX, {"metadata": {"total_size": size}, "weight_map": kept})
    small = [path for path in model.iterdir() if path.suffix != ".safetensors" and path.name not in LEFT_OUT]
    for name in {*kept.values(), *(path.name for path in small)}:
        (backbone / name).symlink_to(Path("..") / MODEL / name)
    (folder / "README.md").write_text(README, encoding="utf-8")
