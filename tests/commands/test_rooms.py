"""Imports point one way: commands -> rooms -> the modules that every command uses."""

import ast
import graphlib
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OURS = ("fastmtp", "evaluation", "benchmarks")

# Where each training or serving framework may be imported.
FRAMEWORKS = {
    "swift": ("fastmtp.swift_plugin", "fastmtp.swift_process"),
    "sglang": ("fastmtp.sglang_ext",),
    "vllm": ("fastmtp.vllm_ext",),
}

# A command that runs, or is a variant of, other commands.
COMMANDS_OF_COMMANDS = {
    ("evaluation.agreement", "evaluation.run"),  # the same plan, servers and arguments, then one pass more
    ("evaluation.lossless", "evaluation.run"),  # the same
    ("benchmarks.ablation.run", "fastmtp.train"),  # trains and exports each arm
    ("benchmarks.ablation.run", "fastmtp.export"),
    ("fastmtp.speedrun", "fastmtp.train"),  # asks it for ms-swift's keys, to refuse a wrong one at once
    ("benchmarks.distill", "fastmtp.distill"),  # runs its generation loop with other settings
}

# Imports inside functions. Each has a reason; anything else belongs at the top of its file.
INSIDE = {
    # matplotlib takes a second to start, and a machine that measures may lack it
    ("fastmtp.report", "fastmtp.show.plots"),
    ("fastmtp.vocab.coverage", "fastmtp.show.plots"),
    ("fastmtp.data.curate_report", "fastmtp.show.plots"),
    ("evaluation.run", "evaluation.charts"),
    ("benchmarks.speed.run", "benchmarks.speed.chart"),
    # only one of the three ways to answer is used, and two need neither transformers nor aiohttp
    ("fastmtp.distill", "fastmtp.data.converse"),
    ("fastmtp.distill", "fastmtp.data.servers"),
    ("fastmtp.distill", "fastmtp.data.engines"),
    ("fastmtp.distill", "fastmtp.data.generate"),
    ("fastmtp.distill", "fastmtp.reference.model"),
    # only vLLM's CPU build needs it; the package itself must not import torch
    ("fastmtp.vllm_ext", "fastmtp.vllm_ext.cpu_sampling"),
    # registers a model type with transformers, which is slow to import
    ("evaluation.lossless", "fastmtp.head.modeling_mimo"),
    # ms-swift is an optional package
    ("fastmtp.train", "fastmtp.swift_plugin"),
}


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the project, by name."""
    paths = [path for top in OURS for path in sorted((REPOSITORY / top).rglob("*.py"))]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    return {
        name.removesuffix(".__init__"): ast.parse(path.read_text(encoding="utf-8"))
        for name, path in zip(names, paths, strict=True)
    }


@cache
def arrows() -> list[tuple[str, str, bool]]:
    """(importing module, imported module, whether inside a function), relative imports resolved."""
    rows = []
    for module, tree in modules().items():
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        inner = {node for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = module.split(".")[: -node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                whole = [f"{base}.{alias.name}" for alias in node.names]
                names = [name if name in modules() else base for name in whole]
            rows += [(module, name, node in inner) for name in sorted(set(names))]
    return rows


@cache
def commands() -> set[str]:
    """Modules that a user runs: those that make a `parser`."""
    return {
        name
        for name, tree in modules().items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "parser" for node in tree.body)
    }


def wrong(rule) -> list[str]:
    return [f"{here} -> {there}" for here, there, _ in arrows() if rule(here, there)]


def test_the_reader_of_imports_sees_relative_and_hidden_ones():
    assert ("fastmtp.head.losses", "fastmtp.head.recursion", False) in arrows()
    assert ("fastmtp.report", "fastmtp.show.plots", True) in arrows()
    assert {"fastmtp.train", "evaluation.run", "benchmarks.speed.run"} <= commands()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_is_imported_in_its_own_module_alone(framework):
    homes = FRAMEWORKS[framework]
    assert not wrong(lambda here, there: within(there, framework) and not any(within(here, h) for h in homes))
    for home in homes:
        assert wrong(lambda here, there, home=home: within(there, framework) and within(here, home))


def test_the_head_imports_torch_transformers_and_itself_alone():
    allowed = {*sys.stdlib_module_names, "torch", "triton", "transformers", "fastmtp"}  # torch brings triton
    assert not wrong(
        lambda here, there: (
            within(here, "fastmtp.head")
            and (
                there.split(".")[0] not in allowed
                or (within(there, "fastmtp") and not within(there, "fastmtp.head"))
            )
        )
    )


def test_no_room_imports_a_command():
    assert not wrong(
        lambda here, there: (
            there in commands() and here not in commands() and not here.endswith("bench_sglang_eagle")
        )
    )


def test_commands_import_commands_only_as_listed():
    pairs = {(a, b) for a, b, _ in arrows() if a in commands() and b in commands() and a != b}
    assert pairs == COMMANDS_OF_COMMANDS


def test_the_package_imports_neither_evaluation_nor_benchmarks():
    assert not wrong(lambda here, there: within(here, "fastmtp") and there.split(".")[0] in OURS[1:])
    assert not wrong(lambda here, there: within(here, "evaluation") and within(there, "benchmarks"))


def test_evaluation_knows_nothing_of_training():
    training = ("fastmtp.train", "fastmtp.swift_plugin", "fastmtp.data.recipe", "fastmtp.data.training_run")
    assert not wrong(
        lambda here, there: within(here, "evaluation") and any(within(there, part) for part in training)
    )


def test_imports_run_in_no_circle():
    """Whole modules, imports inside functions included: a circle is what such an import would hide."""
    graph: dict[str, set[str]] = {}
    for here, there, _ in arrows():
        if there.split(".")[0] in OURS and here != there and not within(here, there):
            graph.setdefault(here, set()).add(there)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_inside_functions_are_listed_with_a_reason():
    assert {
        (here, there) for here, there, inside in arrows() if inside and there.split(".")[0] in OURS
    } == INSIDE


def test_the_contributors_page_names_every_room():
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = {
        name
        for name in modules()
        if name.startswith("fastmtp.") and name.count(".") == 1 and name not in commands()
    }
    rooms = {
        path.name for path in (REPOSITORY / "fastmtp").iterdir() if path.is_dir() and path.name[0] not in "_."
    }
    files = {f"{name.split('.')[1]}.py" for name in parts} - {f"{room}.py" for room in rooms}
    absent = [name for name in (*files, *(f"{room}/" for room in rooms)) if name not in page]
    assert absent == []
