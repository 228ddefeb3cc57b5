"""What Helix takes from DeepSpeed, and DeepSpeed's own faults that a cut model meets.

Each fault is mended by one named replacement. File and line are those of DeepSpeed 0.19.8. A table is installed
only where its fault would be met; `uninstall` puts back what was there.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from helix_megatron.errors import HelixError
from helix_megatron.needs import Need, unmet
from helix_megatron.patching import PatchTable

MARKS = ("tensor_model_parallel", "model_parallel")

UNFUSED_NORM = PatchTable("deepspeed", "bf16 or fp16 without ZeRO")
MOE_GATHER = PatchTable("deepspeed", "DeepSpeed's MoE layer with tensor parallelism")


@UNFUSED_NORM.replace(
    "deepspeed.runtime.fp16.unfused_optimizer:split_params_grads_into_shared_and_expert_params"
)
def _marked_gradients(upstream: Any) -> Callable[..., Any]:
    """Gradients lose their parameters' marks on the way to the norm.

    FP16_UnfusedOptimizer.step (fp16/unfused_optimizer.py:214) passes bare gradients to `get_weight_norm`
    (utils.py:537), which looks there for the marks of sharded parameters, finds none, and counts rank 0's parts
    alone: the norm is too low, and gradients are clipped too little. It is used by ZeRO 0 with bf16 or fp16 and
    any optimizer but FusedAdam. Reported upstream as deepspeedai/DeepSpeed issue 1839.
    """

    def split(group: list[torch.nn.Parameter]) -> tuple[list[Any], list[Any]]:
        shared, experts = upstream(group)
        found = [p for p in group if p.grad is not None]
        for gradients, expert in ((shared, False), (experts, True)):
            owners = [p for p in found if _is_expert(p) == expert]
            for gradient, parameter in zip(gradients, owners, strict=True):
                for mark in MARKS:
                    if getattr(parameter, mark, False):
                        setattr(gradient, mark, True)
        return shared, experts

    return split


def _is_expert(parameter: torch.nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


@MOE_GATHER.replace("deepspeed.moe.mappings:_gather_tokens")
def _gather_flat(upstream: Any) -> Callable[..., Any]:
    """The MoE layer gathers a tensor [e, c, m] into a flat buffer (moe/mappings.py:40), which gloo refuses."""

    def gather(input_: torch.Tensor, dim: int = 0) -> torch.Tensor:
        import deepspeed
        from deepspeed.utils.bwc import (
            bwc_tensor_model_parallel_group,
            bwc_tensor_model_parallel_world_size,
        )

        mpu = deepspeed.utils.groups.mpu
        ranks = bwc_tensor_model_parallel_world_size(mpu)
        if ranks == 1:
            return input_.contiguous()
        everyone = input_.new_empty(ranks * input_.numel())
        deepspeed.comm.all_gather_into_tensor(
            everyone, input_.contiguous().view(-1), group=bwc_tensor_model_parallel_group(mpu)
        )
        return torch.cat(list(everyone.view(ranks, *input_.shape)), dim=dim)

    return gather


# ------------------------------------------------------------------------ what is needed

_ENGINE = "deepspeed:DeepSpeedEngine"
NEEDS = (
    Need(
        "deepspeed:initialize",
        "the engine cannot be made of the model that was cut",
        ("model", "config", "mpu"),
    ),
    Need("deepspeed:init_distributed", "ranks cannot meet before the model is cut"),
    Need("deepspeed:get_accelerator", "ranks cannot meet before the model is cut"),
    Need(
        f"{_ENGINE}.save_checkpoint",
        "a checkpoint does not say how the model was cut",
        ("save_dir", "tag"),
    ),
    Need(
        f"{_ENGINE}.load_checkpoint",
        "a checkpoint that was cut in another way would be loaded",
        ("load_dir", "tag"),
    ),
    Need(f"{_ENGINE}.save_16bit_model", "one rank's part of the weights would be saved as a model"),
    Need(
        "deepspeed.runtime.pipe.module:PipelineModule",
        "a pipeline, which makes its own groups, would go unnoticed",
    ),
    Need("deepspeed.moe.layer:MoE", "faults of its MoE layer would go unnoticed"),
    Need(
        "deepspeed.runtime.tensor_parallel.init_utils:load_ds_config",
        "the configuration cannot be read from a file",
    ),
    Need(
        f"{_ENGINE}._get_optimizer_loss_scale",
        "auxiliary losses of megatron-core's experts are not scaled in fp16",
    ),
)
MENDS = tuple(
    Need(patch.target, f"a fault that {table.purpose} meets cannot be mended")
    for table in (UNFUSED_NORM, MOE_GATHER)
    for patch in table.patches
)


def require() -> None:
    """Raise what the installed DeepSpeed lacks for cutting a model."""
    if problems := unmet("deepspeed", NEEDS):
        raise HelixError(problems[0])


def check() -> list[str]:
    """All that Helix needs and the installed DeepSpeed has not, in sentences; none if it is not installed."""
    return [] if find_spec("deepspeed") is None else unmet("deepspeed", (*NEEDS, *MENDS))
