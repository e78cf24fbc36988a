#!/bin/sh
# What a cycle of chains and trees costs at the 7B shape, on FlashAttention 3 and on Triton, at 1, 8 and 32 streams.
#
#     sh benchmarks/speed/trees.sh results/trees          # about 12 minutes on one H100 with SGLang 0.5.17
#     AT_ONCE=5 sh benchmarks/speed/trees.sh results/trees    # 141 GB of memory hold five servers
#
# costs.json in the folder is what fastmtp.plan reads. A point that fails is named at the end; the others stay, and
# the same command tries it again. The gains of trees over their chains are those of static trees on a 1.5B model's
# head, fitted on the answers that judged them: an upper bound. They do not touch the time of a cycle.
set -eu
cd "$(dirname "$0")/../.."
out=${1:?usage: sh benchmarks/speed/trees.sh FOLDER [options of benchmarks.speed.run]}
shift
points=fa3.plain,fa3.3+32k,fa3.5+8k,fa3.5+32k,fa3.7+32k@adaptive
points=$points,fa3.3+32k@tree4x8,fa3.3+32k@tree4x16,fa3.5+8k@tree4x16
points=$points,tri.plain,tri.3+32k,tri.3+32k@tree4x8,tri.3+32k@tree4x16,tri.5+8k@tree4x16
exec "${PYTHON:-python3}" -m benchmarks.speed.run --shape mimo-7b --rates paper --out "$out" \
    --points "$points" --streams 1,8,32 --tokens 256 --requests 4 --at-once "${AT_ONCE:-3}" --wait 300 \
    --variant fa3= --variant 'tri=--attention-backend triton' \
    --tree-gain 4,3,8=1.15 --tree-gain 4,3,16=1.24 --tree-gain 4,5,16=1.21 "$@"
