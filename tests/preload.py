"""What the ranks of the pool share: imported once, by the server that they are forked from.

Imports of torch, megatron-core, transformers and DeepSpeed take seconds in each rank that does them itself.
"""

from __future__ import annotations

import gc
import os
import unittest.mock

import megatron.core.dist_checkpointing
import megatron.core.distributed
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import megatron.core.transformer.moe.moe_layer  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import helix_megatron.checkpoint.sources
import helix_megatron.huggingface
import helix_megatron.inference.engine
import helix_megatron.megatron.dist_checkpoint
import helix_megatron.megatron.gpt
import helix_megatron.training.pretrain  # noqa: F401

with unittest.mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
    import deepspeed  # noqa: F401

# `RankPool` put the directory of the tests before what it found: what ranks start shall not see it.
_, _, found = os.environ.pop("PYTHONPATH").partition(os.pathsep)
if found:
    os.environ["PYTHONPATH"] = found
# 400,000 objects of imported modules live as long as the ranks: a collection that looks at them takes a quarter
# of a second, and each job ends with one.
gc.collect()
gc.freeze()
