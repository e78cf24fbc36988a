#!/bin/sh
# Builds the documentation into site/; a warning is an error. `sh scripts/docs.sh serve` shows it while you write.
set -eu
cd "$(dirname "$0")/.."
sh scripts/install.sh
python=.venv/bin/python
"$python" -c 'import material' 2>/dev/null ||
    "$python" -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
[ $# -gt 0 ] || set -- build
export NO_MKDOCS_2_WARNING=1 # an advertisement for a successor, not about these pages
exec "$python" -m mkdocs "$@" --strict
