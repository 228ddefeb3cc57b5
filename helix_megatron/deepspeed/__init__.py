"""Helix for DeepSpeed: a block in the configuration cuts the model before DeepSpeed gets it.

    from helix_megatron.deepspeed import initialize

    engine, optimizer, loader, scheduler = initialize(model=model, config="ds_config.json")

`initialize` has the signature and the results of `deepspeed.initialize`. Without the block, it is it.
"""

from helix_megatron import versions

versions.require("torch", "deepspeed")

from helix_megatron.deepspeed.config import HelixBlock, read_block
from helix_megatron.deepspeed.initialize import initialize

__all__ = ["HelixBlock", "initialize", "read_block"]
