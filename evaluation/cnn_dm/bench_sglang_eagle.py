"""CNN/DailyMail summaries against a running SGLang server. Runs from any folder as a file, and with -m."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))  # this checkout's own code, whatever is installed

from evaluation import harness, tasks  # noqa: E402
from fastmtp.cli import run  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    harness.main(tasks.TASKS[HERE.name], argv)


if __name__ == "__main__":
    run(main)
