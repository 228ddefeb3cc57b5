"""Which kernel computes attention over pages, and why not another.

On a GPU Triton's reads keys and values where they lie (`paged_triton`), where Triton is installed and takes
such heads and pages. Elsewhere pages that are no neighbours are copied, and torch computes (`partial`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from helix_megatron.core.kernels.paged_triton import Tiles


class PagedKernel(Protocol):
    """A module with these functions; `paged_triton` is one."""

    QUERIES: int  # neighbours of a chunk that are computed together

    def takes(self, q_THD: Tensor, k_PSGD: Tensor, v_PSGE: Tensor) -> bool:
        """Whether it computes such heads and pages."""

    def make_tiles(
        self, rows: Sequence[Sequence[int]], pages_BP: Tensor, queries: int, every: int
    ) -> Tiles:
        """What it works on, see `Tiles`."""

    def attend(
        self,
        q_THD: Tensor,
        k_PSGD: Tensor,
        v_PSGE: Tensor,
        tiles: Tiles,
        *,
        scale: float,
        softcap: float | None = None,
        back: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """o [T, H, E] and lse [T, H] in fp32; 0 and -inf for a query that sees no key."""


@dataclass(frozen=True)
class Chosen:
    """The kernel, or None for torch's; and a sentence for people."""

    kernel: PagedKernel | None
    text: str


@functools.cache
def paged_kernel(device: str) -> Chosen:
    """The kernel for devices of a type, looked for once per process; never raises."""
    if device != "cuda" or not torch.cuda.is_available():
        return Chosen(None, "Attention over pages by torch: Triton's kernel needs a GPU.")
    try:
        from helix_megatron.core.kernels import paged_triton
    except Exception as error:  # whatever a build for another torch or CUDA does
        reason = f"{type(error).__name__}: {error}"
        return Chosen(
            None,
            f"Attention over pages by torch, which copies them: no Triton here ({reason:.200}).",
        )
    return Chosen(
        paged_triton,
        "Attention over pages by Triton; by torch where pages are no power of two from 16 on, or fp64.",
    )
