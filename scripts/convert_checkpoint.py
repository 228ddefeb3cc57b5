#!/usr/bin/env python3
"""Convert checkpoints between Hugging Face, Megatron and files per rank: the same as `helix convert`.

    scripts/convert_checkpoint.py models/Llama-3.1-8B checkpoints/llama --to canonical --verify
    scripts/convert_checkpoint.py checkpoints/llama models/back --to huggingface
    scripts/convert_checkpoint.py checkpoints/llama ranks --to ranks --tensor-model-parallel-size 16 \\
        --intra-head-parallel-size 2
"""

import sys
from pathlib import Path

from helix_megatron.checkpoint.command import main

if __name__ == "__main__":
    sys.exit(main(program=Path(__file__).name))
