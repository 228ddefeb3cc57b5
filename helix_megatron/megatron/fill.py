"""Each rank's part of tensors that are given whole, in canonical order.

The model's own `sharded_state_dict` says which part of which global tensor a parameter is: the map that
checkpoints use. Whoever fills a model this way need not know its layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from helix_megatron.errors import HelixError, listed
from helix_megatron.megatron.checkpoint import PermutedFactory

# (key, indices on leading axes that the shape leaves out: layer, expert; shape) → the global tensor.
Whole = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]

LAYERS = "decoder.layers."
EXPERTS = "mlp.experts.experts."
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def fill_weights(model: Any, source: Callable[[str], Tensor]) -> None:
    """Set every parameter of this rank's model chunk from canonical tensors.

    Args:
        model: a `GPTModel`, not wrapped; any layout.
        source: canonical name, such as `decoder.layers.3.mlp.experts.2.linear_fc1.weight` (always with the
            numbers of layer and expert) → the whole canonical tensor, in any dtype. It is called on every
            rank for what that rank needs, possibly more than once for a name. A vocabulary may lack the rows
            that pad it at this layout; they become zero.

    Raises:
        HelixError: a tensor has another shape than the model, or a parameter is of no canonical tensor.
    """

    def whole(key: str, place: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        name = canonical_name(key, place)
        tensor = source(name)
        missing = shape[0] - tensor.shape[0] if name in VOCABULARY else 0
        if missing > 0:
            tensor = F.pad(tensor, (0, 0, 0, missing))
        if tuple(tensor.shape) != shape:
            raise HelixError(
                f"tensor {name} has shape [{listed(tensor.shape)}], and the model needs [{listed(shape)}]."
            )
        return tensor

    filled = set()
    for item in sharded_weights(model):
        item.data.copy_(own_part(item, whole))
        filled.add(item.data.data_ptr())
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() not in filled:
            raise HelixError(
                f"weight {name} of shape [{listed(parameter.shape)}] is not in the model's sharded state "
                "dictionary, so it has no canonical name."
            )


def canonical_name(key: str, place: tuple[int, ...]) -> str:
    """Name of one tensor with the numbers of its layer and expert.

    `("decoder.layers.mlp.experts.experts.linear_fc1.weight", (3, 2))` and, where layers differ,
    `("decoder.layers.3.mlp.experts.experts.linear_fc1.weight", (2,))` →
    `decoder.layers.3.mlp.experts.2.linear_fc1.weight`.
    """
    if not key.startswith(LAYERS):
        return key
    rest = key.removeprefix(LAYERS)
    numbers = list(place)
    if not rest.split(".")[0].isdigit():
        rest = f"{numbers.pop(0)}.{rest}"
    if EXPERTS in rest:
        rest = rest.replace(EXPERTS, f"mlp.experts.{numbers.pop(0)}.")
    assert not numbers, f"{key} has more leading axes than layer and expert"
    return LAYERS + rest


def sharded_weights(model: Any) -> list[Any]:
    """The `ShardedTensor`s and factories of them in a model chunk that hold data."""
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    leaves = _leaves(model.sharded_state_dict(metadata=groups))
    return [item for item in leaves if item.data is not None]


def own_part(item: Any, whole: Whole) -> Tensor:
    """This rank's part of what `whole` gives for a sharded tensor or a factory of them."""
    if isinstance(item, PermutedFactory):
        assert item.index is not None
        tensor = whole(item.key, item.leading_offset, item.global_shape)
        return tensor.index_select(item.axis, torch.as_tensor(item.index))
    if isinstance(item, ShardedTensorFactory):
        return item.merge_fn([_box(part, whole) for part in item.build()])
    return _box(item, whole)


def _box(sharded: ShardedTensor, whole: Whole) -> Tensor:
    leading = sharded.prepend_axis_num
    shape, offset = sharded.global_shape[leading:], sharded.global_offset[leading:]
    tensor = whole(sharded.key, tuple(sharded.global_offset[:leading]), tuple(shape))
    for axis, (start, length) in enumerate(zip(offset, sharded.local_shape, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, (ShardedTensor, ShardedTensorFactory)):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [leaf for child in children for leaf in _leaves(child)]
