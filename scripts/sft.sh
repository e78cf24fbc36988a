#!/bin/sh
# Fine-tune the head: sh scripts/sft.sh [recipe.yaml] [--key value ...]; NPROC_PER_NODE=8 for eight GPUs.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m fastmtp.train "$@"
