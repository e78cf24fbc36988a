"""What a cycle costs on one card: milliseconds by drafts, draft vocabulary and streams, measured or between
measurements.

`python -m benchmarks.speed.run` writes a table for the shape of a model; its weights do not matter to speed.
Between two measurements time is taken as linear in one number at a time: streams, rows of the draft's head,
nodes of a tree, steps. Nothing is guessed outside of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fastmtp.cli import InputError
from fastmtp.files import write_json
from fastmtp.inputs import read_json

# Numbers of a config.json that decide the time of a pass.
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE += ("num_key_value_heads", "head_dim", "vocab_size")


@dataclass(frozen=True)
class Setting:
    """How the engine ran: its flags, and variables as (name, value)."""

    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Drafts:
    """num_steps 0: plain decoding. nodes: tokens of a verify pass; head_rows: rows of the draft's head."""

    num_steps: int
    topk: int
    nodes: int
    head_rows: int

    def with_(self, axis: str, value: int) -> Drafts:
        """The same with another number; a chain's nodes follow its steps."""
        changed = replace(self, **{axis: value})
        return replace(changed, nodes=changed.num_steps + 1) if changed.topk == 1 else changed


AXES = ("streams", "head_rows", "nodes", "num_steps")
Place = tuple[Drafts, int]  # drafts, streams


@dataclass
class CostTable:
    """shape: of the measured model, as in its config.json. costs: ms per cycle, by setting and place."""

    shape: dict
    gpu: str | None
    sglang: str
    costs: dict[Setting, dict[Place, float]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, setting: Setting, drafts: Drafts, streams: int, ms: float) -> None:
        self.costs[setting][drafts, streams] = ms

    def save(self, path: str | Path) -> None:
        rows = [
            {"flags": setting.flags, "environment": dict(setting.environment)}
            | asdict(drafts)
            | {"streams": streams, "ms_per_cycle": ms}
            for setting, costs in self.costs.items()
            for (drafts, streams), ms in costs.items()
        ]
        facts = {"shape": self.shape, "gpu": self.gpu, "sglang": self.sglang}
        write_json(path, facts | {"cycles": rows})

    def ms(self, setting: Setting, drafts: Drafts, streams: int) -> float | None:
        """ms per cycle; None outside of what was measured."""
        return between(self.costs[setting], (drafts, streams), AXES)

    def plain(self, streams: int) -> tuple[Setting, float] | None:
        """The fastest plain decoding: its setting and ms per token and stream."""
        drafts = Drafts(0, 1, 1, self.shape["vocab_size"])
        times = {setting: self.ms(setting, drafts, streams) for setting in self.costs}
        measured = [(ms, n) for n, ms in enumerate(times.values()) if ms is not None]
        return ([*times][min(measured)[1]], min(measured)[0]) if measured else None

    def range(self, axis: str) -> tuple[int, int]:
        """The least and largest number that was measured with drafts."""
        places = [place for costs in self.costs.values() for place in costs if place[0].num_steps]
        numbers = [coordinate(place, axis) for place in places]
        return min(numbers), max(numbers)


def coordinate(place: Place, axis: str) -> int:
    return place[1] if axis == "streams" else getattr(place[0], axis)


def moved(place: Place, axis: str, value: int) -> Place:
    drafts, streams = place
    return (drafts, value) if axis == "streams" else (drafts.with_(axis, value), streams)


def between(costs: dict[Place, float], place: Place, axes: tuple[str, ...]) -> float | None:
    """The cost at `place`: measured, or between its nearest neighbours along the first of `axes` that has
    some on both sides, which may themselves lie between others along the later axes.
    """
    if place in costs:
        return costs[place]
    topk, drafting = place[0].topk, place[0].num_steps > 0
    alike = [known for known in costs if (known[0].topk, known[0].num_steps > 0) == (topk, drafting)]
    for n, axis in enumerate(axes):
        if axis == "nodes" and topk == 1:  # a chain's nodes are its steps
            continue
        here, priced = coordinate(place, axis), {}
        for value in {coordinate(known, axis) for known in alike} - {here}:
            if (ms := between(costs, moved(place, axis, value), axes[n + 1 :])) is not None:
                priced[value] = ms
        below, above = [v for v in priced if v < here], [v for v in priced if v > here]
        if below and above:
            low, high = max(below), min(above)
            return priced[low] + (priced[high] - priced[low]) * (here - low) / (high - low)
    return None


def read_costs(path: str | Path) -> CostTable:
    """A table that benchmarks.speed.run wrote. Raises InputError."""
    content = read_json(path)
    try:
        table = CostTable(content["shape"], content["gpu"], content["sglang"])
        for row in content["cycles"]:
            setting = Setting(tuple(row["flags"]), tuple(sorted(row["environment"].items())))
            numbers = [int(row[name]) for name in ("num_steps", "topk", "nodes", "head_rows")]
            table.add(setting, Drafts(*numbers), int(row["streams"]), float(row["ms_per_cycle"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: not a table of costs ({error}); give the costs.json of benchmarks.speed.run"
        ) from None
    if not any(drafts.num_steps for costs in table.costs.values() for drafts, _ in costs):
        raise InputError(f"{path}: no drafts were measured; run benchmarks.speed.run with some")
    return table


def check_shape(table: CostTable, shape: dict, path: str | Path, model: str | Path) -> None:
    """InputError if the table was measured for a model of another shape (budget.shapes.shape_of)."""
    for name in SHAPE:
        if shape[name] != table.shape.get(name):
            raise InputError(
                f"{path}: measured for {name} {table.shape.get(name)}, but {model} has {shape[name]}; "
                "measure this shape with benchmarks.speed.run"
            )
