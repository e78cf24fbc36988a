"""Does the server accept as many drafts as the model's arithmetic says? tau counted while serving against
`fastmtp.acceptance`.

    python -m evaluation.agreement --model models/NAME --arms baseline,fastmtp:3 --out results/NAME

Takes the arguments and the `--out` of an `evaluation.run`. Each arm's own answers are gone through once more,
teacher-forced, with exactly the computation that the head was trained in; a serving engine that computes
something else accepts fewer drafts. Exit code 1 if the two differ by more than `--tolerance`, or if the
answers say nothing.
"""

from __future__ import annotations

import sys

from evaluation import metrics
from evaluation.arguments import add_arguments
from evaluation.arms import Arm
from evaluation.asking import Prompts
from evaluation.conditions import check_tolerance
from evaluation.plan import Plan
from evaluation.questions import question_keys
from evaluation.run import Result, ask_or_exit, finish
from fastmtp.cli import InputError, Parser, run, split_at_dashes
from fastmtp.files import atomic, write_json
from fastmtp.reference import model as models
from fastmtp.reference.ranks import measure_drafted
from fastmtp.reference.teacher_forced import FULL, measure, pooled
from fastmtp.show.markdown import grid, number
from fastmtp.tau import Acceptance
from fastmtp.vocab.draft_vocab import load_map


def samples_of(prompts: Prompts, questions: list[list[str]], answers: list[dict]) -> list[dict]:
    """Every turn of the answers with its prompt, as `teacher_forced.measure` takes them. Empty outputs have
    no passes.
    """
    user_turns = dict(zip(question_keys(prompts.task, questions), questions, strict=True))
    samples = []
    for row in answers:
        user, texts = user_turns[row["question"]], [turn["text"] for turn in row["turns"]]
        for last, turn in enumerate(row["turns"]):
            if turn["output_ids"]:
                ids = prompts.ids(user[: last + 1], texts[:last])
                sample = {"source": prompts.task.name, "prompt_ids": ids, "output_ids": turn["output_ids"]}
                samples.append(sample)
    return samples


def compare(plan: Plan, results: list[Result], dtype: str) -> list[dict]:
    """One row per arm and task: `{"arm", "task", "questions", "served": {...}, "computed": {...},
    "difference"}` (of tau; None if the answers say nothing).
    """
    rows, loaded = [], {}
    for arm, task, answers in results:
        if not arm.num_steps or arm.adaptive:  # the latter's drafts per pass are not recorded
            continue
        if arm.model not in loaded:
            loaded = {arm.model: models.load(arm.model, dtype, plan.args.device)}  # one at a time: memory
        model = loaded[arm.model]
        samples = samples_of(Prompts(model.tokenizer, task), plan.questions[task.name], answers)
        served = {
            "accept_length": metrics.accept_length(answers),
            "position_rates": metrics.position_rates(answers, arm.num_steps),
        }
        computed = _computed(model, arm, samples)
        taus = served["accept_length"], computed["accept_length"]
        rows.append(
            {
                "arm": arm.name,
                "task": task.name,
                "questions": len(answers),
                "served": served,
                "computed": computed,
                "difference": None if None in taus else taus[0] - taus[1],
            }
        )
    return rows


def _computed(model: models.Model, arm: Arm, samples: list[dict]) -> dict:
    """tau and rates by teacher forcing, a tree's by drafting along the text; None for both if no answer is
    longer than its first token.
    """
    samples = [sample for sample in samples if len(sample["output_ids"]) > 1] and samples
    if not samples:
        return {"accept_length": None, "position_rates": None}
    size = model.net.vocab_size
    maps = {"map": load_map(arm.token_map, model.tokenizer, size)} if arm.token_map else {}
    name = "map" if maps else FULL
    if arm.tree:
        histograms = measure_drafted(model, samples, arm.tree, maps)[name]
        total = Acceptance.over([sample["output_ids"] for sample in samples], histograms)
    else:
        total = pooled(measure(model, samples, arm.num_steps, maps), name)
    return {"accept_length": total.accept_length, "position_rates": total.position_rates}


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
        sides = row["served"], row["computed"]
        rates = [" ".join(f"{x:.3f}" for x in side["position_rates"] or []) or "-" for side in sides]
        taus = [number(side["accept_length"], ".3f") for side in sides]
        difference = number(row["difference"], "+.3f")
        lines.append([row["arm"], row["task"], row["questions"], *taus, difference, *rates])
    return grid(HEAD, lines, text=2) + "\n"


def parser() -> Parser:
    p = Parser(
        "python -m evaluation.agreement",
        "Accept length counted while serving against the teacher-forced one on the same answers; exit code 1"
        " if they differ.",
        "python -m evaluation.agreement --model models/smollm2-fastmtp --arms baseline,fastmtp:3 --tasks all"
        " --device cuda --out results/smollm2",
    )
    add_arguments(p)
    p.add_argument(
        "--tolerance", type=float, default=0.03, help="difference in tau allowed (default %(default)s)"
    )
    return p


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_at_dashes(argv)
    args = parser().parse_args(ours)
    if args.temperature != 0:
        raise InputError("--temperature: teacher forcing follows greedy drafts; compare at 0")
    check_tolerance(args.tolerance)
    plan = Plan(args, flags)
    if not any(arm.num_steps for arm in plan.arms):
        raise InputError("--arms: no arm drafts; name at least one such as fastmtp:3")
    results, _ = ask_or_exit(plan, 0, ("agreement.json", "agreement.md"))
    rows = compare(plan, results, "float32")
    report = {"dtype": plan.dtype, "backend": args.backend, "tolerance": args.tolerance, "rows": rows}
    write_json(plan.out / "agreement.json", report)
    with atomic(plan.out / "agreement.md") as temporary:
        temporary.write_text(markdown(rows), encoding="utf-8")
    finish(plan)
    print(markdown(rows))
    unknown = [f"{row['arm']} on {row['task']}" for row in rows if row["difference"] is None]
    apart = [row for row in rows if row["difference"] is not None and abs(row["difference"]) > args.tolerance]
    if apart:
        names = ", ".join(
            f"{row['arm']} on {row['task']} ({number(row['difference'], '+.3f')})" for row in apart
        )
        sys.exit(f"evaluation.agreement: tau differs by more than {args.tolerance:g}: {names}")
    if unknown:
        sys.exit(f"evaluation.agreement: nothing was verified: {', '.join(unknown)}")


if __name__ == "__main__":
    run(main)
