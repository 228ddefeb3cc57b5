"""Values of the few small tensors on which shapes depend, while all other tensors are fake.

In a mixture of experts the router decides how many tokens go where, and with that the shapes of what follows.
Fake tensors have no values, so the indices that `topk` finds are given here: tokens take the experts in turn.
Whatever is computed from known values alone is known, too: routing maps, tokens per expert, split sizes.
Every rank routes alike, hence a gathered tensor is this rank's, repeated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import _disable_current_modes

from helix_megatron.errors import HelixError

LARGEST = 1 << 22  # elements
LARGEST_REAL = 1 << 16  # of floating-point numbers, on which few shapes depend: no rotary angles
_aten = torch.ops.aten
_FILLED = {
    operator.default: fill
    for fill, operators in (
        (torch.zeros, (_aten.zeros, _aten.zeros_like, _aten.new_zeros)),
        (torch.ones, (_aten.ones, _aten.ones_like, _aten.new_ones)),
    )
    for operator in operators
}
_COUNTING = {_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.full.default}
_ATTRIBUTE = "_helix_value"
_DATA = (
    "whose result depends on the data, and a graph is traced without data. Leave out what needs it"
)


def known(tensor: Any) -> Tensor | None:
    """The value of a fake tensor, if it is known."""
    return getattr(tensor, _ATTRIBUTE, None) if isinstance(tensor, Tensor) else None


def learn(tensor: Tensor, value: Tensor | None) -> None:
    """Give a fake tensor a value, or take it away. Large values of floating-point numbers are not kept."""
    if value is not None and value.is_floating_point() and value.numel() > LARGEST_REAL:
        value = None
    setattr(tensor, _ATTRIBUTE, value)


def numpy_of(tensor: Tensor) -> Any:
    """The value as a numpy array.

    Raises:
        HelixError: it is not known.
    """
    value = known(tensor)
    if value is None:
        raise HelixError(
            f"the model looks at the values of a tensor of shape {tuple(tensor.shape)}, and a graph is traced "
            "without data. Leave out the option that needs it."
        )
    with _disable_current_modes():
        return value.numpy()


def execute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on fake tensors; its outputs have known values where all that they depend on is known.

    Raises:
        HelixError: the operator's output depends on values that are not known.
    """
    tensors = list(tensors_of((args, kwargs)))
    if tensors and all(known(tensor) is not None for tensor in tensors):
        return _on_values(func, args, kwargs)
    if func in (_aten.masked_select.default, _aten.nonzero.default):
        return _selected(func, tensors)
    try:
        out = func(*args, **kwargs)
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise HelixError(
            f"the model runs {func}, {_DATA} (for a mixture of experts --moe-router-load-balancing-type "
            "aux_loss or none works)."
        ) from error
    if func is _aten.topk.default:
        learn(out[1], _in_turn(out[1].shape, args[0].shape[args[2] if len(args) > 2 else -1]))
    elif isinstance(out, Tensor) and out.numel() <= LARGEST:
        with _disable_current_modes():
            if func in _FILLED:
                learn(out, _FILLED[func](out.shape, dtype=out.dtype))
            elif func in _COUNTING:
                learn(out, func(*args, **kwargs | {"device": "cpu"}))
    for tensor in written_by(func, args, kwargs):  # with what is not known
        if known(tensor) is not None:
            learn(tensor, None)
    return out


def after_gather(output: Tensor, source: Tensor) -> None:
    """All ranks gathered `source` into `output`."""
    value = known(source)
    if value is None or source.numel() == 0:
        learn(output, None)
        return
    with _disable_current_modes():
        copies = output.numel() // source.numel()
        learn(output, value.reshape(-1).repeat(copies).reshape(output.shape))


def tensors_of(value: Any) -> Iterable[Tensor]:
    """Tensors anywhere in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that an operator changes in place, by its schema."""
    arguments = func._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for name in written for tensor in tensors_of(given.get(name))]


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _disable_current_modes():
        value = func(*_with_values(args), **_with_values(kwargs))
    if not isinstance(value, (Tensor, list, tuple)):
        return value  # a Python number, of .item()
    try:
        out = func(*args, **kwargs)
    except (DynamicOutputShapeException, DataDependentOutputException):
        assert isinstance(value, Tensor), f"{func} finds several tensors of unknown shapes"
        out = torch.empty(value.shape, dtype=value.dtype)
    for fake, real in zip(tensors_of(out), tensors_of(value), strict=True):
        learn(fake, real)
    return out


def _with_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return known(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_values, value))
    if isinstance(value, dict):
        return {key: _with_values(item) for key, item in value.items()}
    return value


def _selected(func: Any, tensors: list[Tensor]) -> Tensor:
    """A selection by a mask whose value is known, of a tensor whose value is not."""
    mask = known(tensors[-1])
    if func is _aten.nonzero.default or mask is None:
        raise HelixError(f"the model runs {func}, {_DATA}.")
    with _disable_current_modes():
        count = int(mask.expand(torch.broadcast_shapes(mask.shape, tensors[0].shape)).sum())
    return tensors[0].new_empty(count)


def _in_turn(shape: torch.Size, choices: int) -> Tensor:
    """Row t picks its k different choices in turn: t·k, t·k + 1, … modulo their number."""
    with _disable_current_modes():
        rows = torch.arange(shape.numel()).reshape(shape)
        return rows % choices
