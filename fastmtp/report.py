"""A run in one page: table of heads, loss curves of each step, acceptance at each draft position.

Reads what other commands wrote (ms-swift's logging.jsonl, fastmtp.acceptance's JSON, fastmtp.decoding's rows)
and writes report.md, losses.png and acceptance.png into one folder.

    python -m fastmtp.report --train runs/quickstart --acceptance results/quickstart/acceptance.json \\
        --decoding results/quickstart/float32.jsonl results/quickstart/bfloat16.jsonl --out results/quickstart
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fastmtp import files
from fastmtp.cli import InputError, Parser, run
from fastmtp.inputs import existing, read_json, read_jsonl
from fastmtp.show import markdown
from fastmtp.show.markdown import number
from fastmtp.tau import Acceptance, summarise

Curves = dict[str, list[tuple[int, float]]]  # {"mtp_loss_k": [(optimiser step, loss in nats per token)]}
Pooled = dict[tuple[str, str], Acceptance]  # by head and map

DECODING = """## Decoding, greedy, one stream

Plain and drafted decoding of the same prompts in one run, in turn; prefill excluded. In bfloat16 the two may
part where two tokens are nearly equally likely, because kernels round differently for one row and for four;
float32 shows whether the method loses anything.
"""
ACCEPTANCE = """## Heads, from one teacher-forced pass over the same answers

tau: output tokens per verify pass. Draft k: share of verify passes whose draft k was accepted.
"""


def read_losses(folder: str | Path) -> Curves:
    """The loss of each step from ms-swift's log. Raises InputError if it has none."""
    path = Path(folder) / "logging.jsonl"
    curves: Curves = {}
    for place, row in read_jsonl(path):
        if "learning_rate" not in row:  # the closing summary, an evaluation
            continue
        for key, value in row.items():
            if key.startswith("mtp_loss_"):
                try:
                    step = int(str(row["global_step/max_steps"]).split("/")[0])
                    curves.setdefault(key, []).append((step, float(value)))
                except (KeyError, TypeError, ValueError):
                    raise InputError(
                        f"{path}:{place}: not a line of ms-swift's log; fix or remove it"
                    ) from None
    if not curves:
        raise InputError(f"{path}: no mtp_loss in it; give the output_dir of a run of fastmtp.train")
    return curves


def read_acceptance(path: str | Path) -> Pooled:
    """Pooled acceptance from fastmtp.acceptance's JSON, in the file's order. Raises InputError."""
    rows = read_json(path).get("rows")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: no rows; write it with fastmtp.acceptance --out")
    pooled: Pooled = {}
    for number_, row in enumerate(rows):
        if not is_row(row, {"head": str, "map": str, "output_tokens": int, "histogram": list}):
            raise InputError(f"{path}: row {number_} is not fastmtp.acceptance's; write it with --out again")
        part = pooled.setdefault((row["head"], row["map"]), Acceptance())
        part.add(row["output_tokens"], row["histogram"])
    if len({len(part.histogram) for part in pooled.values()}) > 1:
        raise InputError(f"{path}: rows of different --num-steps; write it with fastmtp.acceptance again")
    return pooled


def read_decoding(path: str | Path) -> dict:
    """Pooled figures of fastmtp.decoding's rows. Raises InputError."""
    kinds = {"output_ids": list, "verify_passes": int, "histogram": list, "identical": bool}
    kinds |= {"plain_s": (int, float), "draft_s": (int, float)}
    rows = []
    for place, row in read_jsonl(path):
        if not is_row(row, kinds) or (rows and len(row["histogram"]) != len(rows[0]["histogram"])):
            raise InputError(f"{path}:{place}: not a row of fastmtp.decoding; give its --out")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows; give the --out of fastmtp.decoding")
    return summarise(rows)


def is_row(row: object, kinds: dict) -> bool:
    """Whether an object has the keys of `kinds` with values of these kinds, and counts in its histogram."""
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), kind) for name, kind in kinds.items())
        and all(type(count) is int and count >= 0 for count in row["histogram"])
    )


def head_name(head: str) -> str:
    """How a head is called in tables: its folder, or the run of a checkpoint."""
    path = Path(head)
    return path.parent.name if "checkpoint" in path.name else path.name


def draw(out: Path, curves: Curves | None, pooled: Pooled | None) -> None:
    """losses.png and acceptance.png, those that there is something for."""
    from fastmtp.show import plots  # needs matplotlib, which a report of decoding alone does without

    if curves:
        figure, axes = plots.plt.subplots(figsize=(7, 4.2), layout="constrained")
        for name, points in sorted(curves.items()):
            axes.plot(*zip(*points, strict=True), label=f"step {name.removeprefix('mtp_loss_')}")
        axes.set(xlabel="optimiser step", ylabel="loss (nats per token)", title="Loss of each recursive step")
        _finish(plots, figure, axes, out / "losses.png")
    if pooled:
        figure, axes = plots.plt.subplots(figsize=(7, 4.2), layout="constrained")
        heads = list(dict.fromkeys(head for head, _ in pooled))
        for (head, map_), part in pooled.items():
            if part.position_rates is None:  # nothing was verified, so there is no curve
                continue
            rates = [100 * rate for rate in part.position_rates]
            label = f"{head_name(head)}{'' if map_ == 'full' else f' + {map_}'}: tau {part.accept_length:.2f}"
            look = plots.style(heads.index(head)) | {"linestyle": "-" if map_ == "full" else "--"}
            axes.plot(range(1, len(rates) + 1), rates, label=label, **look)
        axes.set(xlabel="draft position", ylabel="accepted (% of verify passes)", ylim=(0, None))
        axes.set_title("Acceptance")
        _finish(plots, figure, axes, out / "acceptance.png")


def _finish(plots, figure, axes, path: Path) -> None:
    plots.whole_numbers(axes.xaxis)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    plots.save(figure, path)


def heads_table(pooled: Pooled) -> str:
    steps = len(next(iter(pooled.values())).histogram) - 1
    rows = []
    for (head, map_), part in pooled.items():
        rates = [number(rate, ".1%").replace("%", " %") for rate in part.position_rates or [None] * steps]
        rows.append([head_name(head), map_, number(part.accept_length, ".3f"), *rates])
    return markdown.grid(["head", "map", "tau", *(f"draft {i + 1}" for i in range(steps))], rows, text=2)


def decoding_table(runs: dict[str, dict]) -> str:
    head = ["run", "prompts", "tokens", "tau", "plain tokens/s", "with drafts tokens/s"]
    head += ["speed-up", "identical"]
    rows = []
    for name, f in runs.items():
        speeds = [f["output_tokens"] / f[key] if f[key] else None for key in ("plain_s", "draft_s")]
        rows.append(
            [
                *(name, f["questions"], f["output_tokens"], number(f["accept_length"], ".3f")),
                *(number(speed, ".1f") for speed in speeds),
                *(number(f["speedup"], ".2f"), f"{f['identical']} of {f['questions']}"),
            ]
        )
    return markdown.grid(head, rows, text=1)


def evaluated(folder: Path, out: Path) -> str:
    """table.md of evaluation.run one heading lower, its pictures linked from `out`. Raises InputError."""
    text = existing(folder / "table.md", "table of evaluation.run").read_text(encoding="utf-8")
    text = re.sub(r"^#", "##", text, flags=re.M)
    return re.sub(r"\]\((\w+\.png)\)", rf"]({os.path.relpath(folder, out)}/\1)", text)


def report(
    train: str | None,
    acceptance: str | None,
    decoding: Sequence[str],
    out: str | Path,
    evaluation: str | None = None,
) -> None:
    """Write report.md and its pictures into `out`; parts that are not given are left out."""
    out = Path(out)
    runs = {Path(path).stem: read_decoding(path) for path in decoding}
    if len(runs) < len(decoding):
        raise InputError("--decoding: two files of one name; rename one of them")
    pooled = read_acceptance(acceptance) if acceptance else None
    curves = read_losses(train) if train else None

    files.claim(out, folder=True)
    if curves or pooled:
        draw(out, curves, pooled)
    lines = ["# Report", ""]
    if evaluation:
        lines += [evaluated(Path(evaluation), out), ""]
    if runs:
        lines += [DECODING, decoding_table(runs), ""]
    if pooled:
        lines += [ACCEPTANCE, heads_table(pooled), ""]
        lines += ["![acceptance at each draft position](acceptance.png)", ""]
    if curves:
        lines += ["## Training", "", "![loss of each recursive step](losses.png)", ""]
    with files.atomic(out / "report.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.report",
        "Markdown table and pictures of a run.",
        "python -m fastmtp.report --train runs/quickstart --acceptance acceptance.json \\\n"
        "    --decoding results/quickstart/float32.jsonl --out results/quickstart",
    )
    p.add_argument("--train", help="output_dir of a training run: loss curves")
    p.add_argument("--acceptance", help="JSON of fastmtp.acceptance: table of heads and acceptance curves")
    p.add_argument("--evaluation", help="--out of evaluation.run: its table and pictures")
    p.add_argument("--decoding", nargs="+", default=[], help="rows of fastmtp.decoding: speed and identity")
    p.add_argument("--out", required=True, help="folder for report.md and the pictures")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if not (args.train or args.acceptance or args.decoding or args.evaluation):
        raise InputError("nothing to report; give --train, --acceptance, --evaluation or --decoding")
    report(args.train, args.acceptance, args.decoding, args.out, args.evaluation)
    sources = [*args.decoding, *([args.acceptance] if args.acceptance else [])]
    sources += [Path(args.train) / "logging.jsonl"] if args.train else []
    sources += [Path(args.evaluation) / "results.jsonl"] if args.evaluation else []
    files.write_provenance(args.out, vars(args), sources)
    print(json.dumps({"report": str(Path(args.out) / "report.md")}))


if __name__ == "__main__":
    run(main)
