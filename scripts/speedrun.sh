#!/bin/sh
# A raw model to the paper's table: sh scripts/speedrun.sh --model NAME_OR_FOLDER --data configs/data/local.yaml \
#     --questions bench --out runs/NAME
# Reuses finished stages, continues interrupted ones; --dry-run shows every command, --smoke runs on the CPU.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m fastmtp.speedrun "$@"
