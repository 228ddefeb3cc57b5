#!/usr/bin/env python3
"""Generate text from a checkpoint on any number of ranks. See --help."""

import sys

from helix_megatron.inference.command import main

if __name__ == "__main__":
    sys.exit(main(program="generate.py"))
