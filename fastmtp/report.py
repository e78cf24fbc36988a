"""A run in one page: table of heads, loss curves of each step, acceptance at each draft position.

Reads what other commands wrote (ms-swift's logging.jsonl, fastmtp.acceptance's JSON, fastmtp.decoding's rows)
and writes report.md, losses.png and acceptance.png into one folder.

    python -m fastmtp.report --train runs/quickstart --acceptance results/quickstart/acceptance.json \\
        --decoding results/quickstart/float32.jsonl results/quickstart/bfloat16.jsonl --out results/quickstart
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from fastmtp import files  # noqa: E402
from fastmtp.cli import InputError, Parser, run  # noqa: E402
from fastmtp.decoding import summarise  # noqa: E402
from fastmtp.tau import Acceptance  # noqa: E402


def read_losses(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """{"mtp_loss_k": [(optimiser step, loss in nats a token)]} from ms-swift's log. InputError if it has
    none.
    """
    path = Path(folder) / "logging.jsonl"
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, row in files.read_jsonl(path):
        for key, value in row.items():
            if key.startswith("mtp_loss_") and "learning_rate" in row:
                curves.setdefault(key, []).append(
                    (int(str(row["global_step/max_steps"]).split("/")[0]), float(value))
                )
    if not curves:
        raise InputError(f"{path}: no mtp_loss in it; give the output_dir of a run of fastmtp.train")
    return curves


def read_acceptance(path: str | Path) -> dict[tuple[str, str], Acceptance]:
    """{(head, map): pooled acceptance} from fastmtp.acceptance's JSON, in the file's order."""
    pooled: dict[tuple[str, str], Acceptance] = {}
    for row in files.read_json(path).get("rows", []):
        part = pooled.setdefault((row["head"], row["map"]), Acceptance())
        part.add(row["output_tokens"], row["histogram"])
    if not pooled:
        raise InputError(f"{path}: empty; write it with fastmtp.acceptance --out")
    return pooled


def head_name(head: str) -> str:
    """How a head is called in tables: its folder, or the run of a checkpoint."""
    path = Path(head)
    return path.parent.name if "checkpoint" in path.name else path.name


def draw_losses(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in sorted(curves.items()):
        axes.plot(*zip(*points, strict=True), label=f"step {name.removeprefix('mtp_loss_')}", linewidth=1.8)
    axes.set(xlabel="optimiser step", ylabel="loss (nats a token)", title="Loss of each recursive step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def draw_acceptance(pooled: dict[tuple[str, str], Acceptance], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    heads = list(dict.fromkeys(head for head, _ in pooled))
    for (head, map_), part in pooled.items():
        rates = [100 * rate for rate in part.position_rates]
        label = f"{head_name(head)}{'' if map_ == 'full' else f' + {map_}'}: tau {part.accept_length:.2f}"
        style = "o-" if map_ == "full" else "s--"
        axes.plot(
            range(1, len(rates) + 1), rates, style, label=label, color=f"C{heads.index(head)}", linewidth=1.8
        )
    axes.set(
        xlabel="draft position", ylabel="accepted (% of verify passes)", ylim=(0, None), title="Acceptance"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)
    plt.close(figure)


def heads_table(pooled: dict[tuple[str, str], Acceptance]) -> list[str]:
    steps = len(next(iter(pooled.values())).histogram) - 1
    lines = ["| head | map | tau | " + " | ".join(f"draft {i + 1}" for i in range(steps)) + " |"]
    lines.append("|---|---|---:|" + "---:|" * steps)
    for (head, map_), part in pooled.items():
        rates = " | ".join(f"{100 * rate:.1f} %" for rate in part.position_rates)
        lines.append(f"| {head_name(head)} | {map_} | {part.accept_length:.3f} | {rates} |")
    return lines


def decoding_table(runs: dict[str, dict]) -> list[str]:
    lines = [
        "| run | prompts | tokens | tau | plain tokens/s | with drafts tokens/s | speed-up | identical |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, f in runs.items():
        plain, drafted = f["output_tokens"] / f["plain_s"], f["output_tokens"] / f["draft_s"]
        lines.append(
            f"| {name} | {f['questions']} | {f['output_tokens']} | {f['accept_length']:.3f} | {plain:.1f} | {drafted:.1f} | "
            f"{f['speedup']:.2f} | {f['identical']} of {f['questions']} |"
        )
    return lines


def report(train: str | None, acceptance: str | None, decoding: Sequence[str], out: str | Path) -> None:
    """Write report.md and its pictures into `out`; parts that are not given are left out."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# Report", ""]
    if decoding:
        runs = {Path(path).stem: summarise([row for _, row in files.read_jsonl(path)]) for path in decoding}
        lines += [
            "## Decoding, greedy, one stream",
            "",
            "Plain and drafted decoding of the same prompts in one run, in turn; prefill excluded. In bfloat16 the two may",
            "part where two tokens are nearly equally likely, because kernels round differently for one row and for four;",
            "float32 shows whether the method loses anything.",
            "",
            *decoding_table(runs),
            "",
        ]
    if acceptance:
        pooled = read_acceptance(acceptance)
        draw_acceptance(pooled, out / "acceptance.png")
        lines += [
            "## Heads, from one teacher-forced pass over the same answers",
            "",
            "tau: output tokens per verify pass. Draft k: share of verify passes whose draft k was accepted.",
            "",
            *heads_table(pooled),
            "",
            "![acceptance at each draft position](acceptance.png)",
            "",
        ]
    if train:
        draw_losses(read_losses(train), out / "losses.png")
        lines += ["## Training", "", "![loss of each recursive step](losses.png)", ""]
    with files.atomic(out / "report.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def parser() -> Parser:
    p = Parser(
        "python -m fastmtp.report",
        "Markdown table and pictures of a run.",
        "python -m fastmtp.report --train runs/quickstart --acceptance results/quickstart/acceptance.json \\\n"
        "    --decoding results/quickstart/float32.jsonl --out results/quickstart",
    )
    p.add_argument("--train", help="output_dir of a training run: loss curves")
    p.add_argument("--acceptance", help="JSON of fastmtp.acceptance: table of heads and acceptance curves")
    p.add_argument("--decoding", nargs="+", default=[], help="rows of fastmtp.decoding: speed and identity")
    p.add_argument("--out", required=True, help="folder for report.md and the pictures")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if not (args.train or args.acceptance or args.decoding):
        raise InputError("nothing to report; give --train, --acceptance or --decoding")
    report(args.train, args.acceptance, args.decoding, args.out)
    print(json.dumps({"report": str(Path(args.out) / "report.md")}))


if __name__ == "__main__":
    run(main)
