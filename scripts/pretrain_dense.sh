#!/usr/bin/env bash
# Train the paper's 4-layer dense model. Options after --preset are those of scripts/pretrain_gpt.py.
#
#   scripts/pretrain_dense.sh                  small: four ranks on this machine, no GPU needed
#   scripts/pretrain_dense.sh --preset full    full size: 16 GPUs, two nodes of eight. Run it on each node with
#                                            NODE_RANK and MASTER_ADDR set (NNODES and GPUS_PER_NODE differ
#                                            for other machines).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
helix_environment ""
pretrain_preset paper-dense "$@"
