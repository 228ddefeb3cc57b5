"""Hugging Face models, alone or inside a module of the user's."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from helix_megatron.deepspeed.batches import check_first_batch
from helix_megatron.deepspeed.config import KEY, HelixBlock
from helix_megatron.deepspeed.models import (
    CutModel,
    ModelParallelUnit,
    unit_beside,
    unit_of,
    with_size,
)
from helix_megatron.errors import HelixError, listed
from helix_megatron.huggingface import make_groups, shard, sharding_of


def cut_huggingface_models(
    model: nn.Module, found: dict[str, Any], block: HelixBlock, mpu: Any, ranks: int
) -> tuple[HelixBlock, ModelParallelUnit, CutModel]:
    """Cut the models `found` (path → model) inside `model`, in place; on `ranks` ranks of the world.

    Models that `helix_megatron.huggingface` has cut before, such as those of its `from_pretrained`, stay as
    they are and must agree with the block.
    """
    shardings = {path: sharding_of(part) for path, part in found.items()}
    cut_before = [sharding for sharding in shardings.values() if sharding is not None]
    intra_head = None
    if mpu is not None:
        unit = unit_of(mpu)
        block = with_size(block, unit.tensor_group.size(), "the mpu")
    elif cut_before:
        unit = unit_beside(cut_before[0].tensor_group)
        block = with_size(block, unit.tensor_group.size(), "the model, which is cut already")
    else:
        block = block.for_world(ranks)
        assert block.tensor_parallel_size is not None
        groups = make_groups(block.tensor_parallel_size, block.helix.intra_head_parallel_size)
        unit = ModelParallelUnit(groups.tensor, groups.data)
        intra_head = groups.intra_head

    _check_equal_weights([p for p in found if shardings[p] is None], found, unit.tensor_group)
    for path, part in found.items():
        sharding = shardings[path]
        if sharding is not None:
            _check_agrees(sharding.plan, block)
            continue
        shard(
            part,
            block.helix,
            tensor_group=unit.tensor_group,
            intra_head_group=intra_head,
            embeddings=block.embeddings,
            mlp=block.mlp,
        )
    check_first_batch(model, unit.tensor_group)
    cut_now = {path: sharding_of(part) for path, part in found.items()}
    plans = {path: sharding.plan for path, sharding in cut_now.items() if sharding is not None}
    layout = next(iter(plans.values())).layout
    cut = CutModel(block, "Hugging Face", layout, _cuts_by_state_name(model, plans))
    return block, unit, cut


def _cuts_by_state_name(model: nn.Module, plans: dict[str, Any]) -> dict[str, Any]:
    """Cuts by the names of `model.state_dict()`, where a tied weight has several."""
    by_parameter: dict[int, Any] = {}
    for path, plan in plans.items():
        part = model.get_submodule(path)
        for name, parameter in part.named_parameters():
            if name in plan.cuts:
                by_parameter[id(parameter)] = plan.cuts[name]
    named = model.named_parameters(remove_duplicate=False)
    return {name: by_parameter[id(p)] for name, p in named if id(p) in by_parameter}


def _check_agrees(plan: Any, block: HelixBlock) -> None:
    asked = block.to_dict()
    has = plan.helix.to_dict() | {"mlp": plan.mlp, "embeddings": plan.embeddings}
    for name, value in has.items():
        if value != asked[name]:
            raise HelixError(
                f'the model was cut with {name} {value!r}, and the block "{KEY}" says {asked[name]!r}. '
                "Make them equal."
            )


def _check_equal_weights(paths: list[str], found: dict[str, Any], group: ProcessGroup) -> None:
    """Ranks cut one model only if all have the same: compare the first values of each weight.

    Raises:
        HelixError: some weight differs; on all ranks of the group.
    """
    prints = {
        f"{path}.{name}" if path else name: _fingerprint(name, parameter)
        for path in paths
        for name, parameter in found[path].named_parameters()
        if getattr(parameter, "allreduce", True)  # experts of DeepSpeed's MoE layer differ
    }
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, prints, group=group)
    differing = [n for n in prints if any(other.get(n) != prints[n] for other in everyone)]
    if differing:
        raise HelixError(
            f"the ranks that share one model have different weights: {listed(differing[:3])}"
            f"{' and others' if len(differing) > 3 else ''}. Build it with the same seed on all ranks, or load "
            "it from the same files."
        )


def _fingerprint(name: str, parameter: torch.Tensor) -> str:
    if parameter.is_meta:
        raise HelixError(
            f"weight {name} is on the meta device and has no values. Load the model first, for example with "
            "helix_megatron.huggingface.from_pretrained, which reads this rank's parts only."
        )
    few = parameter.detach().reshape(-1)[:256].to("cpu", torch.float32)
    digest = hashlib.blake2b(few.numpy().tobytes(), digest_size=8)
    return f"{tuple(parameter.shape)} {digest.hexdigest()}"
