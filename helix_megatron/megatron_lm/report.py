"""`--helix-dry-run`: what a run would be, and where Helix takes part in it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from helix_megatron import parallel_state
from helix_megatron.errors import HelixError
from helix_megatron.megatron_lm.settings import Settings
from helix_megatron.megatron_lm.source import find
from helix_megatron.megatron_lm.table import HookTable, found_core, found_version


def report_and_exit(settings: Settings, tables: Sequence[HookTable]) -> NoReturn:
    """Print everything on the first rank, end the process group, exit with 0. Collective."""
    groups = _group_lines(settings)
    if dist.get_rank() == 0:
        parts = [_layout_lines(settings), groups, _configuration_lines(), _hook_lines(tables)]
        print("\n\n".join("\n".join(lines) for lines in parts), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0)


def _hook_lines(tables: Sequence[HookTable]) -> list[str]:
    """Every hook that is in place: what it changes, where, and in which versions."""
    lines, version = [f"Hooks, in {found_core()}:"], found_version()[:2]
    for table in tables:
        if not table.installed:
            lines.append(f"  ({table.purpose} are not in place: CUDA is available)")
            continue
        for hook in table.hooks:
            if hook.applies_to(version):
                lines.append(f"  {hook.name}: {hook.change}")
                lines += [
                    f"      {_place(target)}  {target.replace(':', '.')}  ({hook.range})"
                    for target in hook.targets
                ]
    return lines


def _place(target: str) -> str:
    """File and line of upstream's object."""
    module = target.partition(":")[0]
    file = getattr(importlib.import_module(module), "__file__", None)
    if file is None:
        return module
    path = Path(file)
    package = path.parents[module.count(".") + (path.name == "__init__.py")]
    try:
        place = find(package, target)
    except HelixError:
        place = None
    return f"{package / place.path}:{place.line}" if place else str(path)


def _layout_lines(settings: Settings) -> list[str]:
    layout = settings.layout
    if layout is None:
        return ["Attention: stock Megatron (intra-head parallel size 1)."]
    helix = settings.helix
    lines = [
        f"Attention: {helix.attention}, {layout.num_heads} query heads and {layout.num_kv_heads} key-value "
        f"heads of {layout.head_dim} dimensions in {layout.head_groups} head groups of {layout.segments} "
        f"segments, query layout {layout.query_layout}, exchange {helix.exchange}.",
        f"Checkpoints: canonical form. Initial weights: "
        f"{'the same at every layout' if settings.layout_free_init else 'as Megatron draws them'}.",
    ]
    return [*lines, *layout.rank_lines()]


def _group_lines(settings: Settings) -> list[str]:
    """Global ranks of every group of each kind. Collective."""
    from megatron.core import parallel_state as megatron

    own = {
        "tensor parallel": _ranks(megatron.get_tensor_model_parallel_group()),
        "pipeline parallel": _ranks(megatron.get_pipeline_model_parallel_group()),
        "data parallel": _ranks(megatron.get_data_parallel_group()),
        "expert parallel": _ranks(megatron.get_expert_model_parallel_group()),
    }
    if settings.helix.active:
        own["intra-head (segments of a head group)"] = tuple(
            parallel_state.get_intra_head_parallel_global_ranks()
        )
        own["head group (equal segments)"] = tuple(
            parallel_state.get_head_group_parallel_global_ranks()
        )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    lines = [f"Process groups of {dist.get_world_size()} ranks:"]
    for kind in own:
        groups = sorted({groups[kind] for groups in everyone})
        lines.append(f"  {kind}: {' '.join(str(list(group)) for group in groups)}")
    return lines


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _configuration_lines() -> list[str]:
    """The transformer configuration, as far as it differs from the class's defaults."""
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(get_args())
    lines = [f"{type(config).__name__}, where it differs from its defaults:"]
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if value != setting.default:
            lines.append(f"  {setting.name} = {getattr(value, '__name__', value)}")
    return lines
