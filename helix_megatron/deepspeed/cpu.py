"""DeepSpeed can train without a GPU when it is told so before it is imported."""

from __future__ import annotations

import os
import sys

from helix_megatron.errors import HelixError


def use_cpu() -> None:
    """Have DeepSpeed train on the CPU over gloo, and compile nothing.

    Call it before anything imports DeepSpeed. On a CPU it would compile a library for collectives in shared
    memory when torch.distributed begins (about a minute, and g++ and ninja are needed); gloo does without. The
    optimizer `"type": "AdamW"` compiles another unless its `params` have `"torch_adam": true`.

    Raises:
        HelixError: DeepSpeed has chosen another accelerator already.
    """
    chosen = sys.modules.get("deepspeed.accelerator.real_accelerator")
    accelerator = getattr(chosen, "ds_accelerator", None)
    if accelerator is not None and accelerator.device_name() != "cpu":
        raise HelixError(
            f"DeepSpeed is imported already and uses {accelerator.device_name()}. Call "
            "helix_megatron.deepspeed.cpu.use_cpu() before importing it, or set DS_ACCELERATOR=cpu."
        )
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    # A release without this table compiles the library once; nothing else depends on it.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
