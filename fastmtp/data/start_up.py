"""How long a training takes until its first step has ended, phase by phase.

The phases follow each other and pass from fastmtp.train to the process that trains, first in a file, then in
its environment: the plugin is a module of its own there.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE, VARIABLE = "start-up.json", "FASTMTP_START_UP"


@dataclass
class StartUp:
    """seconds: phase -> wall seconds. since: when the current phase began, as time.time() counts."""

    since: float = field(default_factory=lambda: time.time())
    seconds: dict[str, float] = field(default_factory=dict)

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was spent on `phase`."""
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.since = now

    def line(self) -> str:
        """As "start-up 41.2 s: imports 12.0, rows 15.3, model 8.1, trainer 4.0, first step 1.8"."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"start-up {sum(self.seconds.values()):.1f} s: {phases}"

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> StartUp:
        """What `write` left in `folder`."""
        return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))

    def hand_on(self) -> None:
        """Leave it to the plugin, which takes it with `taken`."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def taken(cls) -> StartUp:
        """What `hand_on` left; a new one if ms-swift was started by hand."""
        return cls(**json.loads(os.environ[VARIABLE])) if os.environ.get(VARIABLE) else cls()
