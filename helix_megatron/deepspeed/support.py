"""What of DeepSpeed does not go together with the block is refused before anything is cut."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from helix_megatron.deepspeed.config import KEY
from helix_megatron.errors import HelixError

# DeepSpeed settings (dotted) that may not be on, why, and what to do instead.
REFUSED: tuple[tuple[str, str, str], ...] = (
    (
        "tensor_parallel.autotp_size",
        "AutoTP would cut the model a second time",
        f'Leave it out and say "tensor_parallel_size" in the block "{KEY}", which cuts MLPs, too',
    ),
    (
        "expert_parallel.enabled",
        "AutoEP refuses a tensor parallel mpu",
        "Leave it out: the experts of a Hugging Face model are cut among the tensor parallel ranks",
    ),
    (
        "sequence_parallel_size",
        "Ulysses takes whole heads of a part of the sequence, where Helix has parts of heads",
        f'Leave it out and give those ranks to "intra_head_parallel_size" in the block "{KEY}"',
    ),
    (
        "hybrid_engine.enabled",
        "the hybrid engine replaces the layers that were cut",
        "Leave it out",
    ),
    (
        "compile.deepcompile",
        "DeepCompile rewrites the graph of a model that runs on every rank alike",
        "Leave it out",
    ),
    (
        "checkpoint.load_universal",
        "universal checkpoints know no segments of heads",
        "Save and load with the same block, or merge the checkpoint into whole weights "
        "(python -m helix_megatron.deepspeed.merge) and begin from those",
    ),
)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed's own settings would do to a model that is cut."""
    for name, why, instead in REFUSED:
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is True or (value and value != 1):
            raise HelixError(
                f'"{name}": {json.dumps(value)} does not go together with the block "{KEY}": {why}. '
                f"{instead}."
            )


def check_call(call: Mapping[str, Any]) -> None:
    """Refuse arguments of `initialize` with which the model cannot be cut."""
    from deepspeed.runtime.pipe.module import PipelineModule

    model, optimizer = call.get("model"), call.get("optimizer")
    if model is None:
        raise HelixError("initialize needs a model: pass model=...")
    if isinstance(model, PipelineModule):
        raise HelixError(
            f'a PipelineModule does not go together with the block "{KEY}": DeepSpeed\'s pipeline makes its '
            "own groups and takes no mpu. Pass the model itself, or leave the block out."
        )
    if call.get("mesh_param"):
        raise HelixError(
            f'mesh_param = {call["mesh_param"]!r} does not go together with the block "{KEY}": it makes '
            "groups of data and sequence parallel ranks only. Leave it out."
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise HelixError(
            "the model was built under deepspeed.zero.Init, which has dealt its weights to the ranks already, "
            "so that they cannot be cut. Build it outside; with ZeRO 3 DeepSpeed deals the cut weights "
            "in initialize."
        )
    if getattr(optimizer, "state", None):
        raise HelixError(
            f"the {type(optimizer).__name__} that was passed has made steps, and its states have the shapes of "
            "whole weights. Pass a new one; load states afterwards with engine.load_checkpoint."
        )


def check_zero_3(settings: Mapping[str, Any], host: str) -> None:
    """ZeRO 3 takes a module's weights together for the time of its own forward pass.

    Raises:
        HelixError: it is on, and the model's modules use each other's weights.
    """
    if host == "megatron-core" and zero_stage(settings) == 3:
        raise HelixError(
            "ZeRO 3 does not work with megatron-core models, whose modules use each other's weights (tied "
            "embeddings, for one) outside the calls in which ZeRO gathers them. Valid stages: 0, 1, 2. "
            "Hugging Face models work with ZeRO 3."
        )


def prepare_upstream(settings: Mapping[str, Any], model: Any) -> None:
    """Mend what this run would meet of DeepSpeed's own faults, and warn of what stays.

    Raises:
        HelixError: DeepSpeed's MoE layer is used in a way that it gets wrong with tensor parallelism, or this
            DeepSpeed has not what is to be mended.
    """
    from deepspeed.moe.layer import MoE

    from helix_megatron.deepspeed.upstream import MOE_GATHER, UNFUSED_NORM

    moe = [(path, module) for path, module in model.named_modules() if isinstance(module, MoE)]
    for path, module in moe:
        if not module.enable_expert_tensor_parallelism:
            raise HelixError(
                f"DeepSpeed's MoE layer {path} has enable_expert_tensor_parallelism=False: it would deal its "
                "experts to the tensor parallel ranks, and DeepSpeed's gradient norm counts those of the first "
                "alone. Make it with enable_expert_tensor_parallelism=True."
            )
    if moe:
        MOE_GATHER.install()
    if zero_stage(settings) > 0:
        return
    if enabled(settings, "bf16", "bfloat16", "fp16"):
        UNFUSED_NORM.install()
    if enabled(settings, "fp16"):
        warnings.warn(
            "fp16 without ZeRO: DeepSpeed 0.19.8 divides gradients by the loss scale and has not multiplied "
            'the loss by it, with or without Helix. Use "zero_optimization": {"stage": 1}.',
            stacklevel=4,
        )
    if any(module.ep_size > 1 for _, module in moe):
        warnings.warn(
            "DeepSpeed's MoE layer with ep_size > 1 and without ZeRO: DeepSpeed clips by the mean of the "
            'ranks\' gradient norms, which is too low. Use "zero_optimization": {"stage": 1}.',
            stacklevel=4,
        )


def zero_stage(settings: Mapping[str, Any]) -> int:
    """`zero_optimization.stage`; 0 without it."""
    zero = settings.get("zero_optimization")
    return int(zero.get("stage", 0)) if isinstance(zero, Mapping) else int(bool(zero))


def enabled(settings: Mapping[str, Any], *names: str) -> bool:
    blocks = (settings.get(name) for name in names)
    return any(isinstance(block, Mapping) and bool(block.get("enabled")) for block in blocks)
