#!/usr/bin/env bash
# Check Helix on the NVIDIA GPUs of this machine (1 to 8) in under 8 minutes, and write one page for a report:
# what differs from attention on one rank, which kernels work, a training step, and times. docs/gpus.md says more.
# It installs nothing: run it where python has a CUDA build of torch and what setup.py requires.
#
#   ./scripts/gpu_check.sh                       all GPUs; the page goes to gpu_check.md
#   ./scripts/gpu_check.sh --output page.md      elsewhere
#   ./scripts/gpu_check.sh --device cpu          the same in small sizes, over gloo, to try the script itself
#
# Exit status: 0 all is well, 1 something failed (the page says what), 2 there is no GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
exec "${PYTHON:-python3}" "$root/scripts/gpu_check.py" "$@"
