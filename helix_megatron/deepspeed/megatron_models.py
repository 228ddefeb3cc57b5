"""megatron-core models, which are built cut: what Megatron's own training loop does to their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from helix_megatron.config import HelixConfig
from helix_megatron.core.collectives import all_reduce
from helix_megatron.deepspeed.batches import check_first_batch
from helix_megatron.deepspeed.config import KEY, HelixBlock
from helix_megatron.deepspeed.models import (
    CutModel,
    ModelParallelUnit,
    megatron_config,
    unit_of,
    with_size,
)
from helix_megatron.errors import HelixError
from helix_megatron.megatron.transformer_config import attention_layout

PURPOSE = "tensor/replicated-gradient"
# Setting, the value that works, why others do not.
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("pipeline_model_parallel_size", 1, "DeepSpeed's engine runs the whole model in one forward"),
    ("expert_model_parallel_size", 1, "DeepSpeed's engine knows expert groups of its own MoE layer only"),
    ("context_parallel_size", 1, "DeepSpeed's groups for gradients have no context parallel ranks"),
    ("gradient_accumulation_fusion", False, "DeepSpeed has no main_grad to add gradients to"),
    ("moe_router_enable_expert_bias", False, "Megatron's training loop updates that bias"),
)  # fmt: skip


def cut_megatron_model(
    model: nn.Module, block: HelixBlock, mpu: Any
) -> tuple[HelixBlock, ModelParallelUnit, CutModel]:
    """Check a model that Megatron built, and have its gradients reduced as Megatron's training loop would.

    Raises:
        HelixError: it was not built for this block, or has a setting that needs Megatron's own loop.
    """
    from megatron.core import parallel_state

    config = megatron_config(model)
    helix = getattr(config, "helix", None)
    if helix is None:
        raise HelixError(
            f"the megatron-core model has a {type(config).__name__}, which cannot say how attention is cut. "
            "Build it with helix_megatron.megatron's HelixTransformerConfig and helix_spec, with the same "
            f'settings as the block "{KEY}".'
        )
    _check_agrees(helix, block.helix)
    if mpu is None:
        unit = ModelParallelUnit(
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_data_parallel_group(),
        )
    else:
        unit = unit_of(mpu)
    block = with_size(block, unit.tensor_group.size(), "Megatron")
    for name, works, why in REFUSED:
        if getattr(config, name, works) not in (works, None):
            raise HelixError(
                f"a megatron-core model with {name} = {getattr(config, name)!r} does not work under DeepSpeed: "
                f"{why}. Set it to {works!r}, or train with scripts/pretrain_gpt.py."
            )
    _check_experts(config, unit.tensor_group)
    _reduce_replicated_gradients(model, config, unit.tensor_group)
    check_first_batch(model, unit.tensor_group)
    cut = CutModel(block, "megatron-core", attention_layout(config))
    if getattr(config, "num_moe_experts", None):
        cut.attached.append(_scale_auxiliary_losses)
    return block, unit, cut


def _check_agrees(helix: HelixConfig, asked: HelixConfig) -> None:
    default = HelixConfig()
    for name, value in asked.to_dict().items():
        has = getattr(helix, name)
        # What the block leaves at its default is the model's to say; the size is what the block is about.
        stated = name == "intra_head_parallel_size" or value != getattr(default, name)
        if stated and has != value:
            raise HelixError(
                f'the model was built with {name} {has!r}, and the block "{KEY}" says {value!r}. '
                "Make them equal."
            )


def _check_experts(config: Any, group: ProcessGroup) -> None:
    expert_size = getattr(config, "expert_tensor_parallel_size", None)
    if getattr(config, "num_moe_experts", None) and expert_size not in (None, group.size()):
        raise HelixError(
            f"expert_tensor_parallel_size {expert_size} leaves ranks with whole experts and a part of the "
            "tokens, whose gradients DeepSpeed would not add up. Valid: the tensor parallel size, "
            f"{group.size()}."
        )


def _reduce_replicated_gradients(model: nn.Module, config: Any, group: ProcessGroup) -> None:
    """Sum (or average) gradients that each rank has a part of though the weight is replicated.

    Megatron does it after the backward pass (finalize_model_grads.py:321): for norms and routers under sequence
    parallelism, for query-key norms by name, and for what is marked `average_gradients_across_tp_domain`. A
    gradient hook does the same before DeepSpeed sees the gradient.
    """
    if group.size() == 1:
        return
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        by_sequence = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
        head_norm = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        if getattr(parameter, "average_gradients_across_tp_domain", False):
            parameter.register_hook(_summed(group, 1 / group.size()))
        elif by_sequence or head_norm:
            parameter.register_hook(_summed(group, 1.0))


def _summed(group: ProcessGroup, factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def reduce(gradient: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return all_reduce(gradient, group, purpose=PURPOSE) * factor

    return reduce


def _scale_auxiliary_losses(engine: Any) -> None:
    """The router's auxiliary losses bypass the loss that DeepSpeed scales: give them the same factor.

    Megatron's schedules do it before each forward pass (pipeline_parallel/schedules.py:290).
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    def set_scale(module: nn.Module, args: Any) -> None:
        # Without ZeRO, DeepSpeed 0.19.8 does not scale the loss (engine.py:3417).
        scaled = engine.fp16_enabled() and engine.zero_optimization()
        scale = engine._get_optimizer_loss_scale() if scaled else 1.0
        factor = scale / engine.gradient_accumulation_steps()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(float(factor), device=engine.device))

    engine.module.register_forward_pre_hook(set_scale)
