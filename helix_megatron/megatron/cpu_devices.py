"""What stands in for CUDA devices, streams, events and tensor types where there is no GPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def is_cuda(device: object) -> bool:
    """Whether a `device` argument names a CUDA device."""
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    return isinstance(device, torch.device) and device.type == "cuda"


class CudaMeansCpu(TorchFunctionMode):
    """Inside this mode `device="cuda"` in any torch function means the CPU.

    megatron-core writes the literal in the middle of its schedules (pipeline_parallel/schedules.py:596,
    983, 2138), attention masks (transformer/utils.py:35, 40), gradient clipping (optimizer/clip_grads.py:
    90, 103, 115, 174, 207), optimizer (optimizer/optimizer.py:473, 481, 485, 907), loss scaler
    (optimizer/grad_scaler.py:15, 88-94) and checkpoints (dist_checkpointing/exchange_utils.py).

    A mode belongs to the thread that entered it.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": CPU}
        elif func is torch.Tensor.to and len(args) > 1 and is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        return func(*args, **kwargs)


class CpuTensorType(str):
    """The name of a tensor type, such as `torch.FloatTensor`, that also equals its CUDA name."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return str(self) == other.replace("torch.cuda.", "torch.", 1)
        return NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    # Equal strings of another spelling hash differently: compare these, don't look them up.
    __hash__ = str.__hash__


class CpuEvent:
    """`torch.cuda.Event`: work on the CPU is done when the call returns, so every event has happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds from this event to the other."""
        return 1000 * (end._seconds - self._seconds)


class CpuStream:
    """`torch.cuda.Stream`: there is one, and it is in order."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        event = event or CpuEvent()
        event.record(self)
        return event


THE_STREAM = CpuStream()
