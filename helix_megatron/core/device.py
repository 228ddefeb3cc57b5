"""From the host to a device, without a wait of the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array of the host as a tensor on a device; a GPU's host does not wait until it is there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from pageable memory a copy is waited for
    return tensor.to(device, non_blocking=True)
