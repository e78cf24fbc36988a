"""A plan as a file: what fastmtp.plan chose, for what it was chosen, and how fastmtp.serve takes it up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastmtp.checkpoint import HEAD_FILE
from fastmtp.cli import InputError
from fastmtp.files import write_json
from fastmtp.fingerprint import Content, differences, fingerprint
from fastmtp.inputs import read_json
from fastmtp.trees.tree import DynamicTree


@dataclass(frozen=True)
class Plan:
    """The drafts to serve. steps: of a server that changes them, by the number of requests from which they
    hold, else empty; environment: of the engine, beside its flags; text: what was chosen.
    """

    num_steps: int
    tree: DynamicTree | None
    token_map: str | None
    flags: list[str]
    environment: dict[str, str]
    steps: dict[int, int]
    text: str


def contents(model: str | Path) -> dict[str, Content]:
    """What a plan's acceptance depends on in the served folder."""
    head = Path(model) / HEAD_FILE
    return {"model": str(model), "head": str(head) if head.exists() else None}


def read_plan(path: str | Path, model: str, adaptive: bool = False) -> Plan:
    """The plan of a file, for this model; adaptive: its best chain, with steps that change.

    Raises InputError if it is none, or one for another model, head or map.
    """
    content = read_json(path)
    try:
        made_for, best = content["fingerprint"], content["best"][0]
        if adaptive:
            best = content["chain"]
        steps = {int(n): k for n, k in best["steps_by_streams"].items()} if adaptive else {}
        tree = DynamicTree(best["topk"], best["num_steps"], best["nodes"]) if best["topk"] > 1 else None
        text = f"{best['name']}, tau {best['tau']:.2f}, {best['speedup']:.2f}x plain decoding expected "
        text += f"(streams: {content['streams']}, card: {content['gpu']})"
        if adaptive:
            text = "steps " + ", ".join(f"{k} from {n} requests on" for n, k in steps.items())
        token_map, flags, environment = best["token_map"], [*best["flags"]], {**best["environment"]}
        plan = Plan(
            max(steps.values(), default=best["num_steps"]), tree, token_map, flags, environment, steps, text
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a plan ({error}); make one with fastmtp.plan") from None
    if not plan.num_steps:
        raise InputError(f"--adaptive: {path} has no chain that pays at any number of requests; leave it out")
    if token_map and not Path(token_map).exists():
        raise InputError(f"{path}: its token map {token_map} is gone; put it back, or plan again")
    now = fingerprint(contents(model) | {"token map": token_map}, {})
    before = made_for | {"token map": best["token_map_content"]}
    if changed := differences({name: before.get(name) for name in now}, now):
        raise InputError(
            f"{path}: made for something else ({'; '.join(changed)}); plan again with fastmtp.plan"
        )
    return plan


def write_steps(plan: Plan, path: Path) -> Path:
    """SGLang's --speculative-adaptive-config: one number of steps from each number of requests on."""
    write_json(path, {str(n): {"candidate_steps": [steps]} for n, steps in plan.steps.items()})
    return path
