#!/bin/sh
# Serve an exported model: sh scripts/serve.sh --model models/NAME [--token-map PATH] [-- SGLang flags]
# One stream at a time, as FastMTP measures. SGLang flags of your own, after --, take the place of the three below.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
case " $* " in
*" -- "*) exec "$python" -m fastmtp.serve --num-steps 3 --port 30000 "$@" ;;
esac
exec "$python" -m fastmtp.serve --num-steps 3 --port 30000 "$@" \
    -- --mem-fraction-static 0.7 --max-running-requests 1 --cuda-graph-max-bs-decode 1
