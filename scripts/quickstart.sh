#!/usr/bin/env bash
# Train a small GPT on real text three ways, and compare: one process; four processes with two heads, which stock
# tensor parallelism refuses; a mixture of experts on four processes. No GPU is needed.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
helix_environment ""

out=runs/quickstart
rm -rf "$out"
common=(--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 128 --micro-batch-size 4
  --global-batch-size 8 --train-iters "${QUICKSTART_ITERS:-50}" --lr 2e-3 --lr-warmup-iters 5)
four=(--nproc-per-node 4 --tensor-model-parallel-size 4 --intra-head-parallel-size 2 --sequence-parallel)
experts=(--num-experts 8 --expert-model-parallel-size 4)

train() {
  local name=$1 title=$2
  shift 2
  echo
  echo "$title"
  echo "  scripts/pretrain_gpt.py $*"
  python scripts/pretrain_gpt.py "$@" --run-name "$name" --metrics-jsonl "$out/$name/metrics.jsonl"
}

train one-process "(a) One process, stock attention" "${common[@]}"
train helix-4-ranks "(b) Four processes for two heads: Helix, exact, n = 2 head groups of m = 2 segments" \
  "${common[@]}" "${four[@]}" --save "$out/helix-4-ranks/checkpoint"
train moe-4-ranks "(c) Mixture of 8 experts, the same way on four processes" \
  "${common[@]}" "${four[@]}" "${experts[@]}"

echo
python -m helix_megatron.training.report "$out"/{one-process,helix-4-ranks,moe-4-ranks} --out "$out" --overwrite \
  --max-difference 1e-4
