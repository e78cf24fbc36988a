"""Does the server accept as many drafts as the model's arithmetic says? tau counted while serving against
`fastmtp.acceptance`.

    python -m evaluation.agreement --model models/NAME --arms baseline,fastmtp:3 --tasks math_500 --out results/NAME

Takes the arguments and the `--out` of an `evaluation.run`. Each arm's own answers are gone through once more,
teacher-forced, with exactly the computation that the head was trained in; a serving engine that computes
something else accepts fewer drafts. Exit code 1 where the two differ by more than `--tolerance`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from evaluation import harness, metrics
from evaluation.plan import Arm, Plan, add_arguments
from evaluation.questions import Task, question_keys
from evaluation.run import ask_or_exit
from fastmtp import acceptance, decoding
from fastmtp.chat import prompt_ids
from fastmtp.cli import InputError, Parser, run
from fastmtp.engines.sglang import split_flags
from fastmtp.files import write_json, write_provenance
from fastmtp.markdown import grid, number
from fastmtp.vocab.token_map import load_token_map


def samples_of(tokenizer, task: Task, questions: list[list[str]], answers: list[dict]) -> list[dict]:
    """Every turn of the answers with its prompt, as `acceptance.measure` takes them. Empty outputs have no
    passes.
    """
    user_turns = dict(zip(question_keys(task, questions), questions, strict=True))
    found = []
    for row in answers:
        user, texts = user_turns[row["question"]], [turn["text"] for turn in row["turns"]]
        for number, turn in enumerate(row["turns"]):
            messages = harness.chat_messages(task, user[: number + 1], texts[:number])
            if turn["output_ids"]:
                ids = prompt_ids(tokenizer, messages)
                found.append({"source": task.name, "prompt_ids": ids, "output_ids": turn["output_ids"]})
    return found


def compare(plan: Plan, found: list[tuple[Arm, Task, list[dict]]], dtype: str) -> list[dict]:
    """One row an arm and task: `{"arm", "task", "questions", "served": {...}, "computed": {...},
    "difference"}` (of tau).
    """
    rows, models = [], {}
    for arm, task, answers in found:
        if not arm.num_steps:
            continue
        if arm.model not in models:
            models = {arm.model: decoding.load(arm.model, dtype, plan.args.device)}  # one at a time: memory
        model = models[arm.model]
        maps = {"map": load_token_map(arm.token_map, model.net.vocab_size)} if arm.token_map else {}
        samples = samples_of(model.tokenizer, task, plan.questions[task.name], answers)
        measured = acceptance.measure(model, samples, arm.num_steps, maps)
        computed = acceptance.pooled(measured, "map" if maps else acceptance.FULL)
        tau = metrics.accept_length(answers)
        rows.append(
            {
                "arm": arm.name,
                "task": task.name,
                "questions": len(answers),
                "served": {
                    "accept_length": tau,
                    "position_rates": metrics.position_rates(answers, arm.num_steps),
                },
                "computed": {
                    "accept_length": computed.accept_length,
                    "position_rates": computed.position_rates,
                },
                "difference": None if None in (tau, computed.accept_length) else tau - computed.accept_length,
            }
        )
    return rows


HEAD = (
    "arm",
    "task",
    "questions",
    "tau served",
    "tau computed",
    "difference",
    "rates served",
    "rates computed",
)


def markdown(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        served, computed = row["served"], row["computed"]
        rates = [
            " ".join(f"{x:.3f}" for x in side["position_rates"] or []) or "-" for side in (served, computed)
        ]
        taus = [number(side["accept_length"], ".3f") for side in (served, computed)]
        difference = number(row["difference"], "+.3f")
        lines.append([row["arm"], row["task"], row["questions"], *taus, difference, *rates])
    return grid(HEAD, lines, text=2) + "\n"


def parser() -> Parser:
    p = Parser(
        "python -m evaluation.agreement",
        "Accept length counted while serving against the teacher-forced one on the same answers; exit code 1 if they differ.",
        "python -m evaluation.agreement --model models/smollm2-fastmtp --arms baseline,fastmtp:3 --tasks all"
        " --device cuda --out results/smollm2",
    )
    add_arguments(p)
    p.add_argument(
        "--tolerance", type=float, default=0.03, help="difference in tau allowed (default %(default)s)"
    )
    return p


def main(argv: list[str] | None = None) -> None:
    ours, sglang_flags = split_flags(argv)
    args = parser().parse_args(ours)
    if args.temperature != 0:
        raise InputError("--temperature: teacher forcing follows greedy drafts; compare at 0")
    plan = Plan(args, sglang_flags)
    if not any(arm.num_steps for arm in plan.arms):
        raise InputError("--arms: no arm drafts; name at least one such as fastmtp:3")
    found, _ = ask_or_exit(plan, 0)
    rows = compare(plan, found, "float32")
    report = {"dtype": plan.dtype, "backend": args.backend, "tolerance": args.tolerance, "rows": rows}
    write_json(Path(args.out) / "agreement.json", report)
    (Path(args.out) / "agreement.md").write_text(markdown(rows), encoding="utf-8")
    write_provenance(args.out, vars(args) | {"dtype": plan.dtype}, [f for f in plan.files.values() if f])
    print(markdown(rows))
    apart = [row for row in rows if row["difference"] is None or abs(row["difference"]) > args.tolerance]
    if apart:
        names = ", ".join(
            f"{row['arm']} on {row['task']} ({number(row['difference'], '+.3f')})" for row in apart
        )
        sys.exit(f"evaluation.agreement: tau differs by more than {args.tolerance:g}: {names}")


if __name__ == "__main__":
    run(main)
