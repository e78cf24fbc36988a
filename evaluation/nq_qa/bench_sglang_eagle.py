"""NQ, closed book, against a running SGLang server. Runs from any folder as a file, and with -m."""

import sys

if __name__ == "__main__":
    sys.path.insert(
        0, __file__.rpartition("/evaluation/")[0]
    )  # this checkout's own code, whatever is installed

from evaluation.harness import script  # noqa: E402

main = script(__file__, __name__)
