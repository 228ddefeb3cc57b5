"""Loading ordinary weights into `segment-local` attention: a permutation of rows and columns.

Segment j of key-value head i becomes key-value head i·m + j of a model with m times the heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from helix_megatron.checkpoint.catalog import segment_local_permutation
from helix_megatron.megatron.checkpoint import permuted
from helix_megatron.model.description import ModelConfig

_ROWS = ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias")
_COLUMNS = ("self_attention.linear_proj.weight",)


def as_segment_local(state: dict[str, Any], model: ModelConfig, segments: int) -> dict[str, Any]:
    """A model's sharded state that reads its attention weights from an ordinary model's checkpoint.

    Args:
        state: sharded state dictionaries of a segment-local model's chunks; changed in place.
        model: the ordinary model; `segments` into which its heads are cut.
    """
    rows, columns = segment_local_permutation(model, segments)

    def replace(item: Any) -> Any:
        if isinstance(item, ShardedTensor) and item.key.endswith(_ROWS):
            return _read_from(item, 0, rows)
        if isinstance(item, ShardedTensor) and item.key.endswith(_COLUMNS):
            return _read_from(item, 1, columns)
        return item

    dict_list_map_inplace(replace, state)
    return state


def _read_from(item: ShardedTensor, axis: int, permutation: np.ndarray) -> Any:
    leading = item.prepend_axis_num
    start = item.global_offset[leading + axis]
    length = item.local_shape[axis]
    return permuted(item, axis, permutation[start : start + length], leading)
