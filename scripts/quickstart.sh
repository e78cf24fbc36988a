#!/bin/sh
# Everything on a small real model: sh scripts/quickstart.sh [--smoke]. Reuses finished stages, resumes interrupted ones.
set -eu
cd "$(dirname "$0")/.."
started=$(date +%s)
sh scripts/install.sh
[ -t 2 ] || export TQDM_DISABLE=1 # in a log file libraries draw no bars; ours prints lines there
exec .venv/bin/python -m fastmtp.quickstart --install-seconds $(($(date +%s) - started)) "$@"
