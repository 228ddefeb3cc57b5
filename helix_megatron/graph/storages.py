"""Memory of fake tensors: how much is alive, and which operator wrote which part of it last.

Tensors that share memory are several views of one storage. An operator that writes through one view changes
what the others read, so a tensor's value comes from the last writes to its part of the storage, not only from
the operator that made the view.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Write:
    """Output `output` of node number `node` went to bytes [low, high) of a storage, as a tensor of `shape`."""

    version: int
    low: int
    high: int
    node: int
    output: int
    shape: tuple[int, ...]


@dataclass(slots=True)
class Storage:
    """One allocation. `version` counts writes; `kind` and `name` are set for what is there before the pass."""

    nbytes: int
    version: int = 0
    writes: list[Write] = field(default_factory=list)
    kind: str = ""
    name: str = ""
    module: str = ""

    def write(self, tensor: Tensor, node: int, output: int) -> int:
        """Note a write through `tensor`; the storage's new version."""
        self.version += 1
        low, high = extent(tensor)
        if low == 0 and high >= self.nbytes:
            self.writes.clear()
        self.writes.append(Write(self.version, low, high, node, output, tuple(tensor.shape)))
        return self.version

    def writes_after(self, version: int, tensor: Tensor) -> list[Write]:
        """Later writes that changed what `tensor` reads."""
        if version == self.version:
            return []
        low, high = extent(tensor)
        return [w for w in self.writes if w.version > version and w.low < high and low < w.high]


class Storages:
    """All storages of a pass; `live` and `peak` count their bytes."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.at_peak: object = None
        self.now: object = None
        self._records: dict[int, Storage] = {}
        self._references: dict[int, weakref.ref] = {}

    def of(self, tensor: Tensor) -> Storage:
        """The storage of a tensor; counted from the first time that it is asked for until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = Storage(storage.nbytes())
            self._references[key] = weakref.ref(storage, functools.partial(self._freed, key))
            self.live += record.nbytes
            if self.live > self.peak:
                self.peak, self.at_peak = self.live, self.now
        return record

    def reset_peak(self) -> None:
        """Count the peak from here."""
        self.peak, self.at_peak = self.live, self.now

    def _freed(self, key: int, _: weakref.ref) -> None:
        del self._references[key]
        self.live -= self._records.pop(key).nbytes


def extent(tensor: Tensor) -> tuple[int, int]:
    """Bytes [low, high) of its storage between a tensor's first and last element."""
    low = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return low, low
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in sizes)
    return low, low + (int(last) + 1) * tensor.element_size()
