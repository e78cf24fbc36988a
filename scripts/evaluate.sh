#!/bin/sh
# The paper's table for your model:
#     sh scripts/evaluate.sh --model models/NAME --vanilla-model models/BASE --out results/NAME
# Give --arms, --tasks or any other flag of `python -m evaluation.run` to change the defaults below.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m evaluation.run --arms baseline,vanilla:3,fastmtp:1,fastmtp:2,fastmtp:3 --tasks all "$@"
