#!/usr/bin/env python3
"""Train a GPT, dense or mixture-of-experts, with attention on m × n ranks. See --help."""

from helix_megatron.training.pretrain import main

if __name__ == "__main__":
    main()
