"""Helix inside megatron-core: the layer and its specs, checkpoints, and a runtime without a GPU."""

from helix_megatron import versions

versions.require("torch", "megatron-core")
