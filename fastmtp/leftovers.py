"""Hidden files and folders that a killed process left beside an output: known by its number, put away later.

An output is written as `.NAME.PID.tmp` and renamed at the end; a folder that it replaces waits for a moment
as `.NAME.PID.old`.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path


def is_running(process: int) -> bool:
    """Whether a process runs. One that was killed may keep its number until its parent has looked at it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self/stat").exists()


def clear(path: Path) -> None:
    """Remove what dead processes left beside output `path`; one that was being replaced comes back."""
    name = re.compile(rf"\.{re.escape(path.name)}\.([1-9]\d{{0,8}})\.(tmp|old)")
    for left in sorted(path.parent.iterdir()):
        match = name.fullmatch(left.name)
        # in a container each start may have the same number: what bears ours is of an earlier one
        if not match or (int(match[1]) != os.getpid() and is_running(int(match[1]))):
            continue
        if match[2] == "old" and not path.exists():
            os.rename(left, path)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
