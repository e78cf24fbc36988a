"""Trees as text: a JSON file with the paths of a static tree, or TOPK,DEPTH,NODES for a dynamic one.

{"paths": [[0], [1], [0, 0]], "fitted_on": {"answers": 20, "anchors": 2500, "depth": 3, ...}}
"""

from __future__ import annotations

import re
from pathlib import Path

from fastmtp import files
from fastmtp.cli import InputError
from fastmtp.inputs import existing, read_json
from fastmtp.trees.tree import DraftTree, DynamicTree, StaticTree

NUMBERS = re.compile(r"\d+(,\d+)*")


def parse(text: str) -> DraftTree:
    """What --tree names. Raises InputError."""
    if not NUMBERS.fullmatch(text):
        return load(text)
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) != 3:
        raise InputError(f"--tree {text}: give TOPK,DEPTH,NODES such as 4,3,16, or a file")
    try:
        return DynamicTree(*numbers)
    except ValueError as error:
        raise InputError(f"--tree {text}: {error}") from None


def parse_fit(text: str) -> tuple[int, int, str]:
    """What --fit-tree asks for: nodes, depth and the file to write. Raises InputError."""
    nodes, depth, path = [*text.split(",", 2), "", ""][:3]
    if not (nodes.isdecimal() and depth.isdecimal() and path):
        raise InputError(f"--fit-tree {text}: give NODES,DEPTH,FILE such as 16,3,tree.json")
    if int(nodes) < 2 or int(depth) < 1:
        raise InputError(f"--fit-tree {text}: a tree has at least 2 nodes and depth 1")
    return int(nodes), int(depth), path


def load(path: str | Path) -> StaticTree:
    """The tree of a file that `save` wrote, or that was written by hand. Raises InputError."""
    content = read_json(existing(path, "tree file"))
    unknown = sorted(content.keys() - {"paths", "fitted_on"})
    if unknown:
        raise InputError(f"{path}: unknown key '{unknown[0]}'; a tree has `paths` and `fitted_on`")
    paths = content.get("paths")
    if not isinstance(paths, list) or not all(isinstance(p, list) for p in paths):
        raise InputError(f"{path}: `paths` must be a list of lists of ranks, such as [[0], [1], [0, 0]]")
    try:
        return StaticTree(tuple(map(tuple, paths)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}; fix the file or fit a tree again") from None


def save(path: str | Path, tree: StaticTree, fitted_on: dict) -> None:
    """fitted_on: what a reader must know to trust the tree: answers, head, map."""
    files.write_json(path, {"paths": tree.paths, "fitted_on": fitted_on})


def check_fits(tree: DraftTree, name: str, draft_ids: int, what: str) -> None:
    """InputError if a node of `tree` looks at more drafts than the draft vocabulary `what` has ids."""
    if tree.topk > draft_ids:
        raise InputError(
            f"--tree {name}: a node has up to {tree.topk} drafts, and {what} has {draft_ids} ids; give a "
            "narrower tree or a larger map"
        )
