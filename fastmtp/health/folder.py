"""A folder as the checks see it, and the lines that they write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastmtp.checkpoint import ARCHITECTURE
from fastmtp.formats.weights import Entry, read_tensors

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass
class Line:
    """One line of the page. cure: what to do, if there is something to do."""

    name: str
    level: str
    text: str
    cure: str = ""


@dataclass
class Folder:
    """What the checks look at: config.json and the headers of the weights (empty if unreadable)."""

    path: Path
    config: dict
    entries: dict[str, Entry]

    def tensor(self, name: str) -> Tensor | None:
        """One tensor in float32; None if the folder has none of this name."""
        if name not in self.entries:
            return None
        return next(read_tensors({name: self.entries[name]}))[1].float()

    @property
    def is_mimo(self) -> bool:
        return self.config.get("architectures") == [ARCHITECTURE]

    @property
    def head_names(self) -> list[str]:
        """Tensors of a draft head, ours or another's."""
        return [name for name in self.entries if "mtp" in name or "nextn" in name or ".eh_proj" in name]
