"""See every collective that this process runs, whoever issues it.

`torch.distributed` functions, however they were imported, end in a method of `ProcessGroup`. While an observer
is registered those methods are wrapped; afterwards they are the originals again. The meter and the watchdog
are observers. The wrapping is per process, as `torch.distributed` itself is. Functional collectives (DTensor's)
go another way and are not seen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup

# ProcessGroup method (several torch versions) → the field's name of the collective.
METHODS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "reduce": "reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "all_gather_single": "all-gather",
    "allgather_coalesced": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "all_gather_single_coalesced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "reduce_scatter_single_coalesced": "reduce-scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "receive",
    "recv_anysource": "receive",
    "barrier": "barrier",
}


@dataclass(frozen=True)
class Call:
    """One collective about to run.

    collective: the field's name, such as `all-gather`; purpose: who asked for it (`purpose`), or the group's
    description; sent_bytes: what this rank sends with the usual bandwidth-optimal algorithm.
    """

    collective: str
    purpose: str
    group: ProcessGroup
    sent_bytes: int
    device: torch.device | None


class Observer(Protocol):
    def around(self, call: Call, run: Callable[[], Any]) -> Any:
        """Run the collective by calling `run`, and return what it returns (a `Work` or None)."""


_observers: list[Observer] = []
_originals: dict[str, Any] = {}
_purposes: list[str] = []


@contextlib.contextmanager
def purpose(name: str) -> Iterator[None]:
    """Collectives inside the block are reported under this purpose."""
    _purposes.append(name)
    try:
        yield
    finally:
        _purposes.pop()


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Show every collective inside the block to an observer. Observers nest."""
    add_observer(observer)
    try:
        yield
    finally:
        remove_observer(observer)


def add_observer(observer: Observer) -> None:
    """Show every collective from now on to an observer."""
    if not _observers:
        _wrap_process_group()
    _observers.append(observer)


def remove_observer(observer: Observer) -> None:
    """The inverse of `add_observer`."""
    _observers.remove(observer)
    if not _observers:
        for method, original in _originals.items():
            setattr(ProcessGroup, method, original)
        _originals.clear()


def _wrap_process_group() -> None:
    for method, collective in METHODS.items():
        if hasattr(ProcessGroup, method):
            # The entry of the class itself: put back as it was, it still binds `self`.
            _originals[method] = vars(ProcessGroup)[method]
            setattr(ProcessGroup, method, _observed(getattr(ProcessGroup, method), collective))


def _observed(original: Callable[..., Any], collective: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors(args))
        call = Call(
            collective=collective,
            purpose=_purposes[-1] if _purposes else (self.group_desc or "other"),
            group=self,
            sent_bytes=_sent_bytes(collective, args, self),
            device=tensors[0].device if tensors else None,
        )

        def run() -> Any:
            return original(self, *args, **kwargs)

        for observer in reversed(_observers):
            run = functools.partial(observer.around, call, run)
        return run()

    return method


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _nbytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _sent_bytes(collective: str, args: tuple[Any, ...], group: ProcessGroup) -> int:
    """Bytes that this rank sends: ring or pairwise algorithms, which are bandwidth-optimal."""
    if collective in ("barrier", "receive") or not args:
        return 0
    in_place = collective in ("send", "all-reduce", "broadcast", "reduce")
    size = _nbytes(args[0] if in_place else args[1])  # the others take (outputs, inputs)
    if collective == "all-to-all":
        return size - _kept_bytes(args, group)
    ranks = group.size()
    shares = {"send": ranks, "all-reduce": 2 * (ranks - 1), "all-gather": ranks * (ranks - 1)}
    return shares.get(collective, ranks - 1) * size // ranks


def _kept_bytes(args: tuple[Any, ...], group: ProcessGroup) -> int:
    """Bytes of an all-to-all's input that stay here; args are (outputs, inputs[, output and input splits])."""
    inputs = args[1]
    if not isinstance(inputs, torch.Tensor):
        return _nbytes(inputs[group.rank()])
    splits = args[3] if len(args) > 3 else None  # a list, or numpy's array
    if splits is None or len(splits) == 0:
        return _nbytes(inputs) // group.size()
    return _nbytes(inputs) * int(splits[group.rank()]) // max(int(sum(splits)), 1)
