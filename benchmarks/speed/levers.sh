#!/bin/sh
# What could take away the millisecond that a tree adds to a cycle: our kernels, and SGLang's backends, variables and
# flags, each against the same tree (K=3, topk 4, 16 nodes, 32k map) in SGLang as it is, at one stream and 7B shape.
#
#     sh benchmarks/speed/levers.sh results/levers        # about 12 minutes on one H100 with SGLang 0.5.17
#
# A lever that does not start is named at the end and costs nothing else. With the overlap plan stream SGLang may
# read the tree's mask before it is drawn: a speed measured with it says nothing about the text. Left out, because
# 0.5.17 never reads it: --num-continuous-decode-steps.
set -eu
cd "$(dirname "$0")/../.."
out=${1:?usage: sh benchmarks/speed/levers.sh FOLDER [options of benchmarks.speed.run]}
shift
export FASTMTP_FAST_TREE=0  # our kernels are on only in the variants that say so
tree=3+32k@tree4x16
decode="--speculative-attention-mode decode"
points=fa3.plain,fa3.3+32k,fa3.$tree
for name in kernels attention draft metadata fi draftfa3 mode sync plan page noradix own; do points=$points,$name.$tree; done
points=$points,sync.3+32k,page.3+32k,plan.3+32k
exec "${PYTHON:-python3}" -m benchmarks.speed.run --shape mimo-7b --rates paper --out "$out" \
    --points "$points" --tokens 256 --requests 4 --at-once "${AT_ONCE:-3}" --wait 300 --profile \
    --variant fa3= \
    --variant 'kernels:fa3=FASTMTP_FAST_TREE=1' \
    --variant 'attention:fa3=FASTMTP_FAST_TREE=attention' \
    --variant 'draft:fa3=FASTMTP_FAST_TREE=draft' \
    --variant 'metadata:fa3=FASTMTP_FAST_TREE=metadata' \
    --variant 'fi:fa3=--attention-backend flashinfer --speculative-draft-attention-backend flashinfer' \
    --variant 'draftfa3:fa3=--speculative-draft-attention-backend fa3' \
    --variant "mode:fa3=--prefill-attention-backend fa3 --decode-attention-backend triton $decode" \
    --variant 'sync:fa3=--disable-overlap-schedule' \
    --variant 'plan:fa3=SGLANG_ENABLE_OVERLAP_PLAN_STREAM=1 --attention-backend triton' \
    --variant 'page:fa3=--page-size 64' \
    --variant 'noradix:fa3=--disable-radix-cache' \
    --variant 'own:fa3=SGLANG_EXTERNAL_MODEL_PACKAGE=fastmtp.sglang_ext' \
    --tree-gain 4,3,16=1.24 "$@"
