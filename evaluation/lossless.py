"""Is speculative text the model's own text? Greedy outputs of every arm against plain decoding, token by
token.

    python -m evaluation.lossless --model models/NAME --arms baseline,fastmtp:3 --tasks math_500 \\
        --backend reference --out results/lossless

In float32 every output must be identical. In bfloat16 verifying and decoding round differently, so texts part
after a while; then the first differing token of each question is judged by the backbone in float32: if both
tokens are within `--tolerance` of its top logit, rounding chose; if one is further away, a token was wrong.
Exit code 1 for that, and if there was nothing to compare. Answers already in the folder (say of
evaluation.run) are judged as they are.
"""

from __future__ import annotations

import sys

import torch

from evaluation import metrics
from evaluation.arguments import add_arguments
from evaluation.asking import Prompts
from evaluation.conditions import check_tolerance
from evaluation.metrics import first_difference
from evaluation.plan import Plan
from evaluation.questions import question_keys
from evaluation.run import Result, ask_or_exit, finish
from fastmtp.cli import InputError, Parser, run, split_at_dashes
from fastmtp.files import write_json
from fastmtp.show.progress import Bar

NOTHING = "NOTHING TO COMPARE"


class Backbone:
    """The model as plain decoding sees it, in float32 through stock transformers: no drafts, no cache, no
    kernels.
    """

    def __init__(self, folder: str, device: str):
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()  # it would list the MTP head's tensors, which plain decoding leaves out
        import fastmtp.head.modeling_mimo  # noqa: F401  (registers the released checkpoints' model type)

        self.net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    @torch.inference_mode()
    def next_logits(self, ids: list[int]) -> torch.Tensor:
        """Logits [V] of the token after `ids`, float32."""
        return (
            self.net(input_ids=torch.tensor([ids], device=self.net.device), logits_to_keep=1)
            .logits[0, -1]
            .float()
        )


def judge(
    backbone: Backbone, prompt: list[int], plain: list[int], drafted: list[int], tolerance: float
) -> dict | None:
    """What happened at the first difference of two greedy outputs; None if there is none.

    `margin`: top logit less the second; `plain_gap`, `drafted_gap`: top logit less that of the token each
    chose (None: that output ended there without an end token, which no rounding does). `rounding` is the
    verdict.
    """
    index = first_difference(plain, drafted)
    if index is None:
        return None
    logits = backbone.next_logits(prompt + plain[:index])
    top = logits.topk(2).values
    gaps = [float(top[0] - logits[out[index]]) if index < len(out) else None for out in (plain, drafted)]
    return {
        "position": index,
        "plain_token": plain[index] if index < len(plain) else None,
        "drafted_token": drafted[index] if index < len(drafted) else None,
        "margin": float(top[0] - top[1]),
        "plain_gap": gaps[0],
        "drafted_gap": gaps[1],
        "rounding": all(gap is not None and gap <= tolerance for gap in gaps),
    }


def compare(
    backbone: Backbone,
    prompts: Prompts,
    questions: list[list[str]],
    plain: list[dict],
    drafted: list[dict],
    tolerance: float,
) -> list[dict]:
    """First difference of every question whose outputs differ, in the first turn where they do."""
    task = prompts.task
    user_turns = dict(zip(question_keys(task, questions), questions, strict=True))
    expected = {row["question"]: row["turns"] for row in plain}
    differences = []
    for row in Bar(drafted, desc=f"compare {task.name}", unit="q", leave=False):
        ours, theirs = row["turns"], expected[row["question"]]
        for number in range(len(ours)):
            if ours[number]["output_ids"] == theirs[number]["output_ids"]:
                continue
            user = user_turns[row["question"]][: number + 1]
            ids = prompts.ids(user, [turn["text"] for turn in ours[:number]])
            verdict = judge(
                backbone, ids, theirs[number]["output_ids"], ours[number]["output_ids"], tolerance
            )
            differences.append({"task": task.name, "question": row["question"], "turn": number + 1} | verdict)
            break  # the next turn's prompt is another one
    return differences


def verdict_of(differences: list[dict], dtype: str, questions: int) -> str:
    """`lossless`, `rounding`, `NOT LOSSLESS`, or `NOTHING TO COMPARE` if no question has an answer."""
    if not questions:
        return NOTHING
    if not differences:
        return "lossless"
    if dtype == "float32" or not all(d["rounding"] for d in differences):
        return "NOT LOSSLESS"
    return "rounding"


def parser() -> Parser:
    p = Parser(
        "python -m evaluation.lossless",
        "Compare every arm's greedy outputs with plain decoding's; exit code 1 if a token is wrong.",
        "python -m evaluation.lossless --model models/smollm2-fastmtp --arms baseline,fastmtp:3"
        " --tasks math_500,nq_qa --num-questions 20 --backend reference --out results/lossless",
    )
    add_arguments(p)
    p.add_argument(
        "--tolerance", type=float, default=0.5, help="logits that bfloat16 may confuse (default %(default)s)"
    )
    return p


def main(argv: list[str] | None = None) -> None:
    ours, flags = split_at_dashes(argv)
    args = parser().parse_args(ours)
    if args.temperature != 0:
        raise InputError("--temperature: sampled outputs differ by design; losslessness is checked at 0")
    check_tolerance(args.tolerance)
    plan = Plan(args, flags)
    if plan.arms[0].name != "baseline" or len(plan.arms) < 2:
        raise InputError(
            "--arms: name the baseline and at least one drafting arm, for example baseline,fastmtp:3"
        )
    results, _ = ask_or_exit(plan, 0, ("lossless.json",))
    report = build(plan, results, args.tolerance)
    write_json(plan.out / "lossless.json", report)
    finish(plan)
    for name, arm in report["arms"].items():
        print(summary(name, arm, plan.dtype))
    for verdict, words in (("NOT LOSSLESS", "changed the model's text"), (NOTHING, "has nothing to compare")):
        names = [name for name, arm in report["arms"].items() if arm["verdict"] == verdict]
        if names:
            sys.exit(f"evaluation.lossless: {', '.join(names)} {words}; see {args.out}/lossless.json")


def build(plan: Plan, results: list[Result], tolerance: float) -> dict:
    """`{"dtype", "backend", "tolerance", "arms": {name: {"questions", "identical", "share", "verdict",
    "differences"}}}`.
    """
    answers = {(arm.name, task.name): rows for arm, task, rows in results}
    backbone, tokenizer = Backbone(plan.args.model, plan.args.device), plan.tokenizers[plan.args.model]
    arms = {}
    for arm in plan.arms[1:]:
        differences, questions = [], 0
        for task in plan.tasks:
            plain, drafted = answers["baseline", task.name], answers[arm.name, task.name]
            questions += metrics.identical(drafted, plain)["questions"]
            differences += compare(
                backbone, Prompts(tokenizer, task), plan.questions[task.name], plain, drafted, tolerance
            )
        same = questions - len(differences)
        arms[arm.name] = {
            "questions": questions,
            "identical": same,
            "share": same / questions if questions else None,
            "verdict": verdict_of(differences, plan.dtype, questions),
            "differences": differences,
        }
    return {"dtype": plan.dtype, "backend": plan.args.backend, "tolerance": tolerance, "arms": arms}


def summary(name: str, arm: dict, dtype: str) -> str:
    line = f"{name}: {arm['identical']} of {arm['questions']} outputs identical in {dtype}: {arm['verdict']}"
    if arm["differences"]:
        margins = sorted(d["margin"] for d in arm["differences"])
        worst = max(max(d["plain_gap"] or 0, d["drafted_gap"] or 0) for d in arm["differences"])
        median = margins[len(margins) // 2]
        line += f" (margin at first differences: median {median:.3f}, largest gap {worst:.3f})"
    return line


if __name__ == "__main__":
    run(main)
