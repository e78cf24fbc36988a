"""The whole idea on a real small model, on a laptop: every stage is a command that you can run by itself.

prepare -> distil -> curate -> vocab -> train -> export -> decode held-out prompts -> acceptance -> report.
The prompts are
decoded twice: with the head just trained, and with the one that comes with the package, which saw a hundred
times the text. A finished stage is reused while its command, the files it reads and the stages before it are
the same; an interrupted one resumes. Run by scripts/quickstart.sh, which first makes the environment.

    python -m fastmtp.quickstart            # minutes; results/quickstart
    python -m fastmtp.quickstart --smoke    # the same path on a handful of prompts; results/quickstart-smoke
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastmtp import __version__, files
from fastmtp.cli import Parser, run
from fastmtp.decoding import summarise

PROMPTS = "examples/prompts.jsonl"
VANILLA, SHIPPED = "smollm2-vanilla", "smollm2-fastmtp"  # heads that come with the package


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the full run, or the smoke run."""

    name: str = "quickstart"
    prompts: int = 320
    answer_tokens: int = 128
    train: tuple[str, ...] = ()
    heldout: int = 24
    heldout_tokens: int = 64
    timed: int = 16


SMOKE = Sizes("quickstart-smoke", 16, 24, ("--max_steps", "4", "--logging_steps", "1"), 4, 16, 4)


@dataclass(frozen=True)
class Stage:
    """One command: `python -m fastmtp.MODULE ARGUMENTS`, the files it starts from, and what it makes."""

    name: str
    module: str
    arguments: list[str]
    makes: str
    reads: list[str] = field(default_factory=list)


def stages(s: Sizes) -> list[Stage]:
    """The pipeline for `s`, in order."""
    base, tuned, data, runs, out = (
        "models/smollm2",
        f"models/{s.name}",
        f"data/{s.name}",
        f"runs/{s.name}",
        f"results/{s.name}",
    )
    token_map = f"{data}/vocab/en_8k.pt"
    decode = ["--model", tuned, "--prompts", PROMPTS, "--split", "heldout", "--token-map", token_map]
    decode += ["--max-new-tokens", str(s.heldout_tokens)]
    heads = [VANILLA, f"{runs}/last-checkpoint", SHIPPED]
    modes = [("float32", s.heldout), ("bfloat16", s.timed)]
    recipe = "configs/quickstart.yaml"
    return [
        Stage("prepare", "prepare_model", ["--model", "smollm2", "--head", VANILLA, "--out", base], base),
        Stage(
            "distil",
            "distill",
            [
                "--model",
                base,
                "--prompts",
                PROMPTS,
                "--split",
                "train",
                "--limit",
                str(s.prompts),
                "--batch-size",
                "64",
            ]
            + ["--max-new-tokens", str(s.answer_tokens), "--out", f"{data}/distilled.jsonl"],
            f"{data}/distilled.jsonl",
            [PROMPTS],
        ),
        Stage(
            "curate",
            "curate",
            [
                "--input",
                f"{data}/distilled.jsonl",
                "--recipe",
                "configs/quickstart_curate.yaml",
                "--out",
                f"{data}/train",
            ],
            f"{data}/train",
            ["configs/quickstart_curate.yaml"],
        ),
        Stage(
            "vocab",
            "build_vocab",
            ["--tokenizer", base, "--input", f"{data}/distilled.jsonl", "--lang", "en", "--sizes", "8k,16k"]
            + ["--out", f"{data}/vocab"],
            f"{data}/vocab",
        ),
        Stage(
            "train",
            "train",
            [recipe, "--dataset", f"{data}/train/train.jsonl", "--output_dir", runs, *s.train],
            runs,
            [recipe],
        ),
        Stage(
            "export", "export", ["--base", base, "--head", f"{runs}/last-checkpoint", "--out", tuned], tuned
        ),
        *(
            Stage(
                f"decode {prefix}{dtype}",
                "decoding",
                [
                    *decode,
                    *head,
                    "--limit",
                    str(limit),
                    "--dtype",
                    dtype,
                    "--out",
                    f"{out}/{prefix}{dtype}.jsonl",
                ],
                f"{out}/{prefix}{dtype}.jsonl",
                [PROMPTS],
            )
            for prefix, head in (("", []), ("shipped-", ["--head", SHIPPED]))
            for dtype, limit in modes
        ),
        Stage(
            "acceptance",
            "acceptance",
            [
                "--model",
                base,
                "--data",
                f"{out}/float32.jsonl",
                "--token-map",
                token_map,
                "--out",
                f"{out}/acceptance.json",
            ]
            + [part for head in heads for part in ("--head", head)],
            f"{out}/acceptance.json",
        ),
        Stage(
            "report",
            "report",
            ["--train", runs, "--acceptance", f"{out}/acceptance.json", "--out", out]
            + [
                "--decoding",
                *(f"{out}/{prefix}{dtype}.jsonl" for prefix in ("", "shipped-") for dtype, _ in modes),
            ],
            f"{out}/report.md",
        ),
    ]


def remove(path: Path) -> None:
    """Remove a stage's output and what an interrupted run left of it."""
    for found in (path, *path.parent.glob(f".{path.name}.*")):
        shutil.rmtree(found) if found.is_dir() and not found.is_symlink() else found.unlink(missing_ok=True)


def resume_flags(stage: Stage) -> list[str]:
    """What continues this stage where an interrupted run left it; most commands do so by themselves."""
    if stage.module == "train" and (Path(stage.makes) / "last-checkpoint").exists():
        return ["--resume_from_checkpoint", f"{stage.makes}/last-checkpoint"]
    return []


def perform(stage: Stage, key: str, log: dict, record: Path) -> None:
    """Run one stage unless `log` (kept in the file `record`) says that it is done with this key."""
    command = ["python", "-m", f"fastmtp.{stage.module}", *stage.arguments]
    entry = log.get(stage.name, {})
    if entry.get("key") == key and entry.get("seconds") is not None and Path(stage.makes).exists():
        print(f"[{stage.name}] reused {stage.makes}", flush=True)
        return
    if entry.get("key") != key:
        remove(Path(stage.makes))
        entry = {"key": key, "command": shlex.join(command), "spent": 0.0, "seconds": None}
        log[stage.name] = entry
    print(f"\n[{stage.name}] {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    before, sys.argv = sys.argv, [str(Path(__file__).with_name(f"{stage.module}.py")), *stage.arguments]
    try:
        importlib.import_module(f"fastmtp.{stage.module}").main([*stage.arguments, *resume_flags(stage)])
        finished = True
    except BaseException:
        finished = False
        raise
    finally:
        sys.argv = before
        gc.collect()  # a stage's model is held by reference cycles; the next stage must not load beside it
        entry["spent"] += time.perf_counter() - started
        entry["seconds"] = round(entry["spent"], 1) if finished else None
        files.write_json(record, log)


def summarise_run(sizes: Sizes, log: dict, install_s: float | None) -> dict:
    """Write summary.json; returns it. Accept length and identity in float32, speed-up in bfloat16; of the
    head just trained, those of the shipped head under "shipped".
    """
    out = Path("results") / sizes.name
    exact, fast, shipped_exact, shipped_fast = (
        summarise([row for _, row in files.read_jsonl(out / f"{prefix}{dtype}.jsonl")])
        for prefix in ("", "shipped-")
        for dtype in ("float32", "bfloat16")
    )
    seconds = {name: entry["seconds"] for name, entry in log.items()}
    if install_s is not None:  # a later call finds the environment made: keep what making it took
        before = files.read_json(out / "summary.json")["seconds"] if (out / "summary.json").exists() else {}
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
        "Distil, build a vocabulary, train, export, decode and report on SmolLM2-135M; finished stages are reused.",
        "sh scripts/quickstart.sh\nsh scripts/quickstart.sh --smoke",
    )
    p.add_argument("--smoke", action="store_true", help="the same path on a handful of prompts")
    p.add_argument("--install-seconds", type=float, help="how long the environment took, for summary.json")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    sizes = SMOKE if args.smoke else Sizes()
    files.existing(PROMPTS, "file; run this from the repository's root")
    record = Path("results") / sizes.name / "stages.json"
    files.claim(record.parent, folder=True)
    log = files.read_json(record) if record.exists() else {}
    key = __version__
    for stage in stages(sizes):
        facts = [key, stage.module, stage.arguments, [files.sha256(path) for path in stage.reads]]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        perform(stage, key, log, record)
    s = summarise_run(sizes, log, args.install_seconds)
    print(
        f"quickstart: tau={s['tau']:.2f} speedup={s['speedup']:.2f} lossless={str(s['lossless']).lower()} report={s['report']}"
    )


if __name__ == "__main__":
    run(main)
