#!/bin/sh
# Serve an exported model: sh scripts/serve.sh --model models/NAME [--engine vllm] [--token-map PATH] [-- flags]
# One stream at a time, as FastMTP measures, unless --plan or --adaptive says otherwise. Flags of your own for the
# engine, after --, replace ours.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
case " $* " in
*" -- "* | *" --plan"* | *" --adaptive"*) exec "$python" -m fastmtp.serve "$@" ;;
*" --engine vllm "* | *" --engine=vllm "*) engine=vllm ;;
*" --engine"*) engine=sglang ;;
*) engine=$("$python" -c 'from fastmtp.serve import default_engine; print(default_engine())') ;;
esac
case $engine in
sglang) flags="--mem-fraction-static 0.7 --max-running-requests 1 --cuda-graph-max-bs-decode 1" ;;
*) flags="--max-num-seqs 1" ;;
esac
# shellcheck disable=SC2086 # several words on purpose
exec "$python" -m fastmtp.serve --engine "$engine" "$@" -- $flags
