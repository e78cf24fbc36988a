"""The commands that the pages show, run as they stand, in the pages' order, on a tiny model.

What a page leaves to the reader (a model, prompts) is put there first. Flags that only make a command small,
or let it run without a GPU, are added at its end.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.blocks import REPOSITORY, RUN, blocks
from helpers.tiny import chatml_tokenizer, save_folder, save_llama

from fastmtp import cli

pytest.importorskip("swift")
pytestmark = pytest.mark.slow

TINY = (
    "--use_cpu true --packing false --attn_impl sdpa --bf16 false --torch_dtype float32 --num_train_epochs 1"
)
TINY += " --max_steps 2 --save_steps 1 --logging_steps 1 --dataset_num_proc 1 --dataloader_num_workers 0"
TINY += " --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --max_length 200 --report_to none"
ADDED = {  # by module: what makes it small
    "fastmtp.distill": "--dtype float32 --max-new-tokens 12 --limit 40",
    "fastmtp.train": TINY,
    "fastmtp.fit_head": "--dtype float32",
}
# They start processes of their own, and a fork of this process, whose libraries run threads, can hang.
FORKING = ("fastmtp.train", "fastmtp.curate", "fastmtp.build_vocab")
SMALLER = {"8k,16k,32k": "300,310", "_16k": "_300", "_32k": "_310"}  # the tiny tokenizer has 320 tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the pages take for granted."""
    folder = tmp_path_factory.mktemp("reader")
    prompts = [{"prompt": f"what is {n} plus {n * n % 17}?", "lang": "en"} for n in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    save_folder(folder / "models" / "NAME", max_position_embeddings=2048)
    save_folder(folder / "XiaomiMiMo" / "MiMo-7B-RL", seed=1)
    save_llama(folder / "FINE_TUNED")
    # A random model writes noise and seldom ends: all of it is kept here.
    (folder / "configs").mkdir()
    rules = {"drop_truncated": False, "languages": [], "repeated_ngrams": 1.0, "repeated_lines": 1.0}
    kept = {"eval_share": 0.2, "clean": rules | {"loop_repeats": 50}, "dedup": {"threshold": 1.0}}
    (folder / "configs" / "curate.yaml").write_text(yaml.safe_dump(kept))
    return folder


def before(page: str, place: Path) -> None:
    """What a page finds there, because its reader has done something else before."""
    if page == "stale_head.md":  # a head that was trained on the model before its fine-tuning
        run("python -m fastmtp.prepare_model --model FINE_TUNED --out models/OLD".split(), place)
        run(
            "python -m fastmtp.distill --model models/OLD --prompts prompts.jsonl --out old.jsonl".split(),
            place,
        )
        fit = "python -m fastmtp.fit_head --model models/OLD --data old.jsonl --out runs/NAME/last-checkpoint"
        run(fit.split(), place)
        shutil.copytree(place / "models" / "OLD", place / "FINE_TUNED_MIMO")
    if page == "engines.md":
        shutil.copytree(place / "models" / "OLD", place / "models" / "BASE")
    if page == "language.md":
        (place / "data" / "NAME" / "distilled.jsonl").open("a").write("".join(chinese(40)))


def chinese(count: int) -> list[str]:
    """Distilled samples in Chinese."""
    tokenizer, rows = chatml_tokenizer(), []
    for n in range(count):
        answer = f"答案是第{n}个，因为天气很好。" * 3
        ids = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        chat = [{"role": "user", "content": f"第{n}个问题是什么？"}]
        chat.append({"role": "assistant", "content": answer, "token_ids": ids})
        row = {"id": f"zh-{n}", "source": "", "lang": "zh", "messages": chat, "prompt_ids": [5, 6]}
        rows.append(json.dumps(row | {"output_ids": ids, "finish": "stop", "key": f"zh-{n}"}) + "\n")
    return rows


def run(words: list[str], place: Path) -> None:
    """One command line in `place`; scripts/sft.sh is `fastmtp train` there."""
    while "=" in words[0]:  # several GPUs are one CPU here
        words = words[1:]
    if words[:2] == ["sh", "scripts/sft.sh"]:
        words = ["python", "-m", "fastmtp.train", *words[2:]]
    if words[0] == "fastmtp":
        words = ["python", "-m", cli.COMMANDS[words[1]].module, *words[2:]]
    assert words[:2] == ["python", "-m"], f"this test cannot run {words}; mark its block as not run"
    module, words = words[2], [*words[3:], *ADDED.get(words[2], "").split()]
    if module in FORKING:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, *words]
        result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return
    try:
        importlib.import_module(module).main(words)
    except SystemExit as end:
        assert module == "fastmtp.doctor" and end.code == 1, words  # its verdict on a head of random numbers
    except cli.InputError as error:
        pytest.fail(f"{module} {' '.join(words)}: {error}")


@pytest.mark.parametrize("page", RUN)
def test_a_page(page, place, monkeypatch):
    """The pages build on each other, as they do for a reader."""
    monkeypatch.chdir(place)
    before(page, place)
    shown = [block for block in blocks(REPOSITORY / "docs" / page) if block.language == "sh"]
    for block in shown:
        if block.not_run is None:
            for words in block.commands():
                for old, new in SMALLER.items() if page == "language.md" else ():
                    words = [word.replace(old, new) for word in words]
                if words[0] != "pip":
                    run(words, place)
