"""Measurements: `python -m helix_megatron.bench --help` lists them."""
