"""The intra-head parallel dimension, registered beside tensor, pipeline, data and expert parallelism.

Tensor parallel ranks t = i·m + j form, for every pipeline stage and data parallel replica,

    intra-head groups   the m ranks of equal i: the segments of one head group; they exchange
    head groups         the n ranks of equal j: one segment of every head group

Megatron's own groups are untouched: the tensor parallel group stays all p = m·n ranks. This module is the one
place that looks groups up in a global, as hosts do; everything below takes them as arguments.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

DEFAULT_TIMEOUT_MINUTES = 30.0


@dataclass(frozen=True)
class _Groups:
    intra_head: ProcessGroup
    head_group: ProcessGroup


_groups: _Groups | None = None


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    *args: Any,
    intra_head_parallel_size: int = 1,
    distributed_timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES,
    **kwargs: Any,
) -> None:
    """Megatron's `initialize_model_parallel`, and the groups of intra-head parallelism.

    All other arguments are Megatron's. Every group gets the timeout, and `nccl_communicator_config_path` and
    `high_priority_stream_groups` count for these groups, too (`register_intra_head_parallel`).

    Raises:
        HelixError: groups exist already, or m does not divide `tensor_model_parallel_size`.
    """
    from megatron.core import parallel_state

    _refuse_twice()
    if parallel_state.model_parallel_is_initialized():
        raise HelixError(
            "Megatron's model parallel groups exist already. Call helix_megatron.parallel_state."
            "register_intra_head_parallel(m) to add those of intra-head parallelism."
        )
    HelixConfig(intra_head_parallel_size).head_groups(tensor_model_parallel_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size,
        *args,
        distributed_timeout_minutes=distributed_timeout_minutes,
        **kwargs,
    )
    register_intra_head_parallel(
        intra_head_parallel_size,
        distributed_timeout_minutes=distributed_timeout_minutes,
        **nccl_arguments(kwargs),
    )


def nccl_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of Megatron's arguments that `register_intra_head_parallel` takes as well."""
    names = ("nccl_communicator_config_path", "high_priority_stream_groups")
    return {name: given[name] for name in names if name in given}


def register_intra_head_parallel(
    intra_head_parallel_size: int,
    *,
    distributed_timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES,
    nccl_communicator_config_path: str | None = None,
    high_priority_stream_groups: Sequence[str] | None = None,
) -> None:
    """Make the groups in a world where Megatron's are initialised. Every rank of the world must call it.

    The ranks of each tensor parallel group are asked for, not computed, so any `order` that was given to
    Megatron is right.

    Args:
        intra_head_parallel_size: m.
        nccl_communicator_config_path, high_priority_stream_groups: as Megatron's `initialize_model_parallel`
            has them. The groups take what is said of `ihp`, or else, being parts of it, of `tp`.

    Raises:
        HelixError: Megatron is not initialised, the groups exist already, or m does not divide TP.
    """
    global _groups
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        raise HelixError(
            "Megatron's model parallel groups do not exist yet. Call "
            "helix_megatron.parallel_state.initialize_model_parallel instead, or Megatron's own first."
        )
    _refuse_twice()
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    m = intra_head_parallel_size
    HelixConfig(m).head_groups(tensor_group.size())
    timeout = datetime.timedelta(minutes=distributed_timeout_minutes)
    tensor = all_ranks_of(tensor_group)
    neighbours = [ranks[at : at + m] for ranks in tensor for at in range(0, len(ranks), m)]
    same_segment = [ranks[segment::m] for ranks in tensor for segment in range(m)]
    options = _nccl_options(nccl_communicator_config_path, high_priority_stream_groups or ())
    _groups = _Groups(
        own_group(neighbours, "INTRA_HEAD_PARALLEL_GROUP", timeout, options),
        own_group(same_segment, "HEAD_GROUP_PARALLEL_GROUP", timeout, options),
    )


def _nccl_options(config_path: str | None, high_priority: Sequence[str]) -> Any:
    """As Megatron makes them for its own groups; None where nothing is asked."""
    from megatron.core.parallel_state import get_nccl_options

    configs: dict[str, dict[str, Any]] = {}
    if config_path is not None:
        import yaml

        configs = yaml.safe_load(Path(config_path).read_text(encoding="utf-8"))
    for name in high_priority:
        configs.setdefault(name, {})["is_high_priority_stream"] = True
    return get_nccl_options("ihp" if "ihp" in configs else "tp", configs)


def intra_head_parallel_is_initialized() -> bool:
    """Tell whether the groups of intra-head parallelism exist."""
    return _groups is not None


def destroy_model_parallel() -> None:
    """Forget the intra-head groups and Megatron's. Does nothing where none exist."""
    from megatron.core import parallel_state

    destroy_intra_head_parallel()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def destroy_intra_head_parallel() -> None:
    """Forget the intra-head groups only."""
    global _groups
    if _groups is not None and dist.is_initialized():
        for group in (_groups.intra_head, _groups.head_group):
            dist.destroy_process_group(group)
    _groups = None


# ------------------------------------------------------------------------- accessors


def get_intra_head_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The m ranks that hold the segments of this rank's head group, in order of j.

    Raises:
        HelixError: the groups do not exist (None instead with `check_initialized=False`).
    """
    return _get("intra_head", check_initialized)


def get_intra_head_parallel_world_size() -> int:
    """m, the number of segments of a head."""
    return _get("intra_head").size()


def get_intra_head_parallel_rank() -> int:
    """j, this rank's segment."""
    return _get("intra_head").rank()


def get_intra_head_parallel_global_ranks() -> list[int]:
    """Global ranks of the intra-head group."""
    return dist.get_process_group_ranks(_get("intra_head"))


def get_head_group_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """The n ranks that hold this rank's segment of every head group, in order of i.

    Raises:
        HelixError: the groups do not exist (None instead with `check_initialized=False`).
    """
    return _get("head_group", check_initialized)


def get_head_group_parallel_world_size() -> int:
    """n, the number of head groups."""
    return _get("head_group").size()


def get_head_group_parallel_rank() -> int:
    """i, this rank's head group."""
    return _get("head_group").rank()


def get_head_group_parallel_global_ranks() -> list[int]:
    """Global ranks of the group of equal segments."""
    return dist.get_process_group_ranks(_get("head_group"))


def use_mpu_process_groups(required_pgs: list[str] | None = None) -> ProcessGroupCollection:
    """Megatron's collection of process groups, with the intra-head group added as `ihp`."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return with_intra_head_groups(ProcessGroupCollection.use_mpu_process_groups(required_pgs))


def with_intra_head_groups(pg_collection: ProcessGroupCollection) -> ProcessGroupCollection:
    """A copy of a collection that carries the intra-head group as `ihp`; one that it has already is kept."""
    collection = copy.copy(pg_collection)
    if not hasattr(collection, "ihp"):
        collection.ihp = get_intra_head_parallel_group()
    return collection


def _get(name: str, check_initialized: bool = True) -> Any:
    if _groups is None:
        if check_initialized:
            raise HelixError(
                "intra-head parallel groups do not exist. Call helix_megatron.parallel_state."
                "initialize_model_parallel(..., intra_head_parallel_size=m), or "
                "register_intra_head_parallel(m) where Megatron is initialised already."
            )
        return None
    return getattr(_groups, name)


def _refuse_twice() -> None:
    if _groups is not None:
        raise HelixError(
            "intra-head parallel groups exist already. Call "
            "helix_megatron.parallel_state.destroy_model_parallel before making others."
        )


# ---------------------------------------------------------------------- making groups


def own_group(
    groups: Sequence[Sequence[int]],
    description: str,
    timeout: datetime.timedelta | None = None,
    options: Any = None,
) -> ProcessGroup:
    """Make groups of these ranks, one of which holds this rank: that one. Every rank of the world calls it.

    `options` are those of the back end, such as `ProcessGroupNCCL.Options`.
    """
    rank, own = dist.get_rank(), None
    for ranks in groups:
        group = dist.new_group(
            list(ranks), timeout=timeout, pg_options=options, group_desc=description
        )
        own = group if rank in ranks else own
    assert own is not None
    return own


def all_ranks_of(group: ProcessGroup) -> list[list[int]]:
    """The ranks of every group of this kind in the world, in an order on which all ranks agree.

    The fake back end, used for tracing, knows the group of the one rank that it plays only.
    """
    own = dist.get_process_group_ranks(group)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return [list(ranks) for ranks in sorted({tuple(ranks) for ranks in everyone})]
