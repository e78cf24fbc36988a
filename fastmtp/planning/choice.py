"""Which drafts are expected to bring the most tokens per second: all that a table of costs can price, with
the accept length that your own answers give.

tokens/s = streams x tau / seconds of a cycle. Chains and fixed trees are read off the ranks of the text's
tokens (reference/ranks.py), trees as SGLang draws them are drafted again along the text. Half of the answers
judges; fixed trees are fitted on the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastmtp.budget.shapes import context_bytes, rows_bytes
from fastmtp.cli import InputError
from fastmtp.planning.costs import CostTable, Drafts, Setting
from fastmtp.reference.model import Model
from fastmtp.reference.ranks import measure_drafted, measure_ranks
from fastmtp.reference.teacher_forced import FULL
from fastmtp.tau import Acceptance
from fastmtp.trees.fit import acceptance, fit, halves
from fastmtp.trees.tree import DynamicTree, StaticTree

Shape = tuple[int, int, int]  # num_steps, topk, nodes


@dataclass(frozen=True)
class Choice:
    """Drafts over the map `map_name` under an engine's setting. ms: of a cycle of all `streams`."""

    drafts: Drafts
    map_name: str
    setting: Setting
    streams: int
    ms: float

    @property
    def shape(self) -> Shape:
        return self.drafts.num_steps, self.drafts.topk, self.drafts.nodes

    def tokens_per_s(self, tau: float) -> float:
        return 1000 * self.streams * tau / self.ms


@dataclass
class Judged:
    """What one half of the answers says of some drafts. fixed: tau of a tree of the same size and depth whose
    shape was fitted on the other half; None for chains, and where too few paths occur.
    """

    acceptance: Acceptance
    fixed: float | None = None

    @property
    def tau(self) -> float:
        return self.acceptance.accept_length


def shapes(table: CostTable) -> list[Shape]:
    """Of all that was measured, and of the chains between."""
    places = [drafts for costs in table.costs.values() for drafts, _ in costs if drafts.num_steps]
    chains = [drafts.num_steps for drafts in places if drafts.topk == 1]
    between = range(min(chains), max(chains) + 1) if chains else ()
    trees = {(d.num_steps, d.topk, d.nodes) for d in places if d.topk > 1}
    return [(steps, 1, steps + 1) for steps in between] + sorted(trees)


def priced(table: CostTable, maps: dict[str, int], streams: int) -> list[Choice]:
    """Every choice that the table can price, in its fastest setting. maps: rows of each draft vocabulary.

    Raises InputError for streams or a map outside of what was measured.
    """
    if table.plain(streams) is None:
        raise outside("--streams", streams, table, "streams")
    result = []
    for name, rows in maps.items():
        choices = []
        for shape in shapes(table):
            drafts = Drafts(*shape, rows)
            costs = [(table.ms(setting, drafts, streams), setting) for setting in table.costs]
            known = [(ms, n) for n, (ms, _) in enumerate(costs) if ms is not None]
            if known:
                ms, n = min(known)
                choices.append(Choice(drafts, name, costs[n][1], streams, ms))
        if not choices and name != FULL:
            raise outside(f"map {name}", rows, table, "head_rows")
        result += choices
    if not result:
        raise outside("--streams", streams, table, "streams")
    return result


def outside(what: str, value: int, table: CostTable, axis: str) -> InputError:
    low, high = table.range(axis)
    name = "rows" if axis == "head_rows" else axis
    return InputError(
        f"{what} {value}: the table of costs was measured for {low} to {high} {name}; measure this too, or "
        "stay between"
    )


def judge(
    model: Model, samples: Sequence[dict], maps: dict[str, Tensor | None], choices: Sequence[Choice]
) -> dict[tuple[str, Shape], Judged]:
    """By map name and shape: what the judging half of the samples accepts."""
    depth = max(choice.drafts.num_steps for choice in choices)
    given = {name: ids for name, ids in maps.items() if name != FULL}
    ranks = {name: halves(tables) for name, tables in measure_ranks(model, samples, depth, given).items()}
    judges, result = halves(samples)[1], {}
    answers = [sample["output_ids"] for sample in judges]
    for steps, topk, nodes in dict.fromkeys(choice.shape for choice in choices):
        drafted = {}
        if topk > 1:
            drafted = measure_drafted(model, judges, DynamicTree(topk, steps, nodes), given)
        for name, (fitting, judging) in ranks.items():
            if drafted:
                fixed = fixed_tau(fitting, judging, steps, nodes)
                judged = Judged(Acceptance.over(answers, drafted[name]), fixed)
            else:
                judged = Judged(acceptance(StaticTree.chain(steps), judging))
            result[name, (steps, topk, nodes)] = judged
    return result


def fixed_tau(fitting: Sequence[Tensor], judging: Sequence[Tensor], depth: int, nodes: int) -> float | None:
    """tau of a tree of fixed shape, fitted on one half of the answers and judged on the other."""
    try:
        return acceptance(fit(fitting, nodes, depth), judging).accept_length
    except InputError:  # fewer paths than nodes
        return None


def steps_by_streams(table: CostTable, best: Choice, taus: dict[int, float]) -> dict[int, int]:
    """For each measured number of streams: the chain over the best one's map that brings the most, or 0 if
    plain decoding does. taus: of each number of steps.
    """
    result = {}
    for streams in sorted({n for costs in table.costs.values() for _, n in costs}):
        plain = table.plain(streams)
        speeds = {0: 1 / plain[1]} if plain else {}
        for steps, tau in taus.items():
            ms = table.ms(best.setting, Drafts(steps, 1, steps + 1, best.drafts.head_rows), streams)
            speeds |= {steps: tau / ms} if ms else {}
        if len(speeds) > 1:
            result[streams] = max(speeds, key=speeds.get)
    return result


def memory(shape: dict, drafts: Drafts, mapped: bool) -> dict[str, float]:
    """MiB that drafting takes beside the model, in bfloat16.

    map: the draft's own rows of the output matrix; cache_per_1000_tokens: the head's keys and values;
    drafts_per_stream: keys and values of one stream's drafts, in the backbone and the head.
    """
    slots = drafts.nodes * (shape["num_hidden_layers"] + 1) + drafts.topk * (drafts.num_steps - 1)
    per_layer = context_bytes(shape)
    parts = {"map": rows_bytes(shape, drafts.head_rows) if mapped else 0}
    parts |= {"cache_per_1000_tokens": 1000 * per_layer, "drafts_per_stream": slots * per_layer}
    return {name: part / 2**20 for name, part in parts.items()}
