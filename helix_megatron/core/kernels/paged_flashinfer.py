"""Attention over pages by FlashInfer, where it is installed.

It aligns causality and windows at the last query and the last key of a sequence, and gives logarithms to base 2
(flashinfer/prefill.py of flashinfer-ai/flashinfer).
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helix_megatron.core.kernels.paged import PagedStep

WORKSPACE_BYTES = 128 << 20  # what its documentation recommends
DIMS = (64, 128, 256)
LOG_2 = math.log(2)


class Planned(NamedTuple):
    """What `plan` is given for every layer of a step, and the wrappers that are planned, by kind of layers."""

    numbers: dict[str, Any]
    wrappers: dict[tuple[Any, ...], Any]


class FlashInfer:
    """A `PagedKernel`.

    A wrapper of the package's is planned once a step for each kind of layers, from numbers on the host.
    """

    NAME = "FlashInfer"

    def __init__(self, package: Any) -> None:
        self._package = package
        self._wrappers: dict[tuple[Any, ...], Any] = {}
        self._workspaces: dict[torch.device, Tensor] = {}

    def takes(self, q_THD: Tensor, k_PSGD: Tensor, v_PSGE: Tensor) -> bool:
        """Half precision, keys and values of 64, 128 or 256 dimensions that lie alike; pages of any size."""
        half = q_THD.dtype in (torch.float16, torch.bfloat16) and q_THD.dtype == k_PSGD.dtype
        alike = k_PSGD.shape == v_PSGE.shape and k_PSGD.stride() == v_PSGE.stride()
        return half and alike and q_THD.size(-1) in DIMS

    def fits(self, step: PagedStep, back: int | None) -> bool:
        """Where each sequence's keys end with the last query's: see `PagedStep.is_plain`."""
        return step.is_plain(back)

    def prepare(self, step: PagedStep, back: int | None) -> Planned:
        """Pages and lengths of a step, on the host."""
        size = step.page_size
        blocks = -(-step.keys // size)
        pages = [np.maximum(p.pages[:n], 0) for p, n in zip(step.pieces, blocks, strict=True)]
        numbers = {
            "qo_indptr": step.first_rows,
            "paged_kv_indptr": np.append(0, blocks.cumsum()),
            "paged_kv_indices": np.concatenate(pages),
            "paged_kv_last_page_len": (step.keys - 1) % size + 1,
        }
        on_host: dict[str, Any] = {
            name: torch.from_numpy(array.astype(np.int32)) for name, array in numbers.items()
        }
        causal = step.longest > 1 or back is not None
        return Planned(on_host | {"page_size": size, "causal": causal}, {})

    def attend(
        self,
        q_THD: Tensor,
        k_PSGD: Tensor,
        v_PSGE: Tensor,
        prepared: Planned,
        *,
        scale: float,
        softcap: float | None = None,
        back: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `PagedKernel`."""
        heads, dims = q_THD.shape[1:]
        kind = (heads, k_PSGD.size(2), dims, scale, softcap, back, q_THD.dtype, q_THD.device)
        if kind not in prepared.wrappers:
            wrapper = prepared.wrappers[kind] = self._wrapper(kind)
            wrapper.plan(
                **prepared.numbers,
                num_qo_heads=heads,
                num_kv_heads=k_PSGD.size(2),
                head_dim_qk=dims,
                sm_scale=scale,
                window_left=-1 if back is None else back,
                logits_soft_cap=softcap or 0.0,
                q_data_type=q_THD.dtype,
                kv_data_type=q_THD.dtype,
            )
        o, lse = prepared.wrappers[kind].run(q_THD, (k_PSGD, v_PSGE), return_lse=True)
        return o, lse * LOG_2

    def _wrapper(self, kind: tuple[Any, ...]) -> Any:
        """A wrapper of layers of that kind: planned anew in each step, its memory is kept."""
        device = kind[-1]
        if device not in self._workspaces:
            self._workspaces[device] = torch.zeros(
                WORKSPACE_BYTES, dtype=torch.uint8, device=device
            )
        if kind not in self._wrappers:
            make = self._package.BatchPrefillWithPagedKVCacheWrapper
            self._wrappers[kind] = make(self._workspaces[device], "NHD", backend="fa2")
        return self._wrappers[kind]


def flashinfer() -> FlashInfer:
    """FlashInfer.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    return FlashInfer(importlib.import_module("flashinfer"))
