#!/bin/sh
# What each part of the recipe is worth: trains every arm of configs/ablation.yaml and prints the table.
#   sh scripts/ablation.sh --model models/smollm2 --self-data train.jsonl --source-data source.jsonl --held-out eval.jsonl \
#       --answers answers.jsonl --out results/ablation
# Finished arms are kept. Several GPUs: one process each, such as CUDA_VISIBLE_DEVICES=1 sh scripts/ablation.sh ... --arms k5,k7
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m benchmarks.ablation.run "$@"
