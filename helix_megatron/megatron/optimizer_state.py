"""Optimizer state that any number of optimizers loads from a checkpoint of any other number.

megatron-core keeps expert weights that are parallel in a way of their own (expert or tensor parallel) in a
second optimizer. So the same mixture of experts has one optimizer in one process and two on many ranks, or
on a pipeline stage without experts one again. The tensors have the same names in all cases. What is left, the
settings of parameter groups and the number of steps, megatron-core stores per optimizer; here it is looked
up by what a group is.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import merge

from helix_megatron.errors import HelixError, Setting

PARTS = "optimizer_parts"  # where the sharded tensors are read to, apart from the stored settings
# What tells parameter groups apart; expert groups have the settings of their ordinary counterparts.
IDENTITY = ("wd_mult", "lr_mult", "is_decoupled_lr")
# The schedule's, which the scheduler compares; from 0.19 on megatron-core tells groups apart by them, too.
SCHEDULE = ("max_lr", "min_lr")


def optimizers_of(optimizer: Any) -> list[Any]:
    """The optimizers in a chain, or the one that there is."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def load_optimizer(optimizer: Any, parts: dict[Any, Any], stored: dict[Any, Any]) -> None:
    """Restore an optimizer.

    Args:
        optimizer: megatron-core's, a chain or a single one.
        parts: its own sharded state dictionary with the tensors read.
        stored: what the checkpoint holds besides tensors.

    Raises:
        HelixError: the checkpoint lacks the settings of a parameter group.
    """
    own = optimizers_of(optimizer)
    parts_of = [parts] if len(own) == 1 else [parts[index] for index in range(len(own))]
    entries = _entries(stored)
    states = [merge(_settings(entries, one), part) for one, part in zip(own, parts_of, strict=True)]
    optimizer.load_state_dict(states[0] if len(own) == 1 else dict(enumerate(states)))


def _entries(stored: dict[Any, Any]) -> list[dict[str, Any]]:
    """What is stored per optimizer: a chain has numbers for keys."""
    numbers = sorted(key for key in stored if isinstance(key, int))
    return [stored[number] for number in numbers] or [stored]


def _settings(entries: list[dict[str, Any]], optimizer: Any) -> dict[str, Any]:
    settings = copy.deepcopy(entries[0])
    stored = [group for entry in entries for group in _holder(entry)["param_groups"]]
    _holder(settings)["param_groups"] = [
        _matching(stored, group) for group in optimizer.optimizer.param_groups
    ]
    return settings


def _holder(entry: dict[str, Any]) -> dict[str, Any]:
    """Where the parameter groups are: half precision and distributed optimizers wrap another one."""
    return entry.get("optimizer", entry)


def _matching(stored: list[dict[str, Any]], group: dict[str, Any]) -> dict[str, Any]:
    same = [g for g in stored if all(g.get(k) == group.get(k) for k in IDENTITY)]
    if not same:
        wanted = ", ".join(f"{key} {group.get(key)}" for key in IDENTITY)
        raise HelixError(
            f"the checkpoint's optimizer has no parameter group with {wanted}. It belongs to a run with other "
            "settings of the optimizer.",
            remedy=("Add ", Setting("no_load_optim"), "."),
        )
    expert = group["is_expert_parallel"]
    best = next((g for g in same if g["is_expert_parallel"] == expert), same[0])
    current = {name: group[name] for name in SCHEDULE if name in group}
    return copy.deepcopy(best) | current | {"is_expert_parallel": expert}


def take_schedule(optimizer: Any, scheduler: Any) -> None:
    """Give the parameter groups the learning rates of a schedule that was read from a checkpoint."""
    for one in optimizers_of(optimizer):
        for group in one.optimizer.param_groups:
            group |= {name: getattr(scheduler, name) for name in SCHEDULE if name in group}
