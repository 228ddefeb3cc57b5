"""Helix: attention on more ranks than there are key-value heads, for Megatron and DeepSpeed."""

__version__ = "0.1.0"
