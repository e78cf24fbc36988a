"""Folders that an engine's command line is made for: a config alone, a token map, and reading the line."""

import json

import torch

CONFIG = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}


def exported(folder, **changes):
    """A model folder of 400 tokens without weights; `changes` of its config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 400, **changes}))
    return str(folder)


def a_map(folder, ids=range(20)):
    """A map without a description beside it."""
    torch.save(torch.tensor(list(ids)), folder / "en.pt")
    return str(folder / "en.pt")


def value(line, flag):
    return line[line.index(flag) + 1]
