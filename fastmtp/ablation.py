"""`fastmtp ablation`: what each part of the recipe is worth. The experiment itself is benchmarks/ablation.

python -m fastmtp.ablation --help
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastmtp.checkout import checkout
from fastmtp.cli import InputError, Parser, run


def _experiment():
    """benchmarks.ablation.run of the checkout that this code belongs to; a wheel has no benchmarks."""
    root = checkout()
    if root is None or not (root / "benchmarks").is_dir():
        raise InputError(
            "the ablation is not part of the installed package; run it from the project's checkout"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.ablation.run")


def parser() -> Parser:
    return _experiment().parser()


def main(argv: Sequence[str] | None = None) -> None:
    _experiment().main(argv)


if __name__ == "__main__":
    run(main)
