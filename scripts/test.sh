#!/bin/sh
# Lint and tests, without a GPU: sh scripts/test.sh [pytest options].
set -eu
cd "$(dirname "$0")/.."
sh scripts/install.sh
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest -q "$@"
