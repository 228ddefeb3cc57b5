"""Attention over pages by FlashAttention 3 (Hopper) and 4 (Hopper and Blackwell), where they are installed.

Both align causality and windows at the last query and the last key of a sequence, and give natural logarithms
[H, T] (hopper/flash_attn_interface.py and flash_attn/cute/interface.py of Dao-AILab/flash-attention).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helix_megatron.core.device import on_device
from helix_megatron.core.kernels.paged import PagedStep


class Lengths(NamedTuple):
    """Of a step's pieces: first queries int32 [B + 1], keys int32 [B], pages int32 [B, P], and most queries."""

    first_rows: Tensor
    keys: Tensor
    pages_BP: Tensor
    longest: int


@dataclass(frozen=True)
class FlashAttention:
    """A `PagedKernel`.

    Args:
        NAME: for people.
        function: the package's.
        dims: the most dimensions of heads whose values have as many as their keys; (192, 128) it has, too.
        keys, lse: what the function calls the numbers of keys, and the wish for log-sum-exps.
        everything: the window that hides nothing.
    """

    NAME: str
    function: Callable[..., Any]
    dims: int
    keys: str
    lse: str
    everything: tuple[int | None, int | None]

    def takes(self, q_THD: Tensor, k_PSGD: Tensor, v_PSGE: Tensor) -> bool:
        """Half precision, and the dimensions that it has; pages of any size."""
        d, e = q_THD.size(-1), v_PSGE.size(-1)
        half = q_THD.dtype in (torch.float16, torch.bfloat16)
        return half and ((d, e) == (192, 128) or (d == e <= self.dims and d % 8 == 0))

    def fits(self, step: PagedStep, back: int | None) -> bool:
        """Where each sequence's keys end with the last query's: see `PagedStep.is_plain`."""
        return step.is_plain(back)

    def prepare(self, step: PagedStep, back: int | None) -> Lengths:
        """The lengths of a step."""
        first_rows, keys = (on_device(array, step.device) for array in (step.first_rows, step.keys))
        return Lengths(first_rows, keys, step.pages_BP, step.longest)

    def attend(
        self,
        q_THD: Tensor,
        k_PSGD: Tensor,
        v_PSGE: Tensor,
        prepared: Lengths,
        *,
        scale: float,
        softcap: float | None = None,
        back: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `PagedKernel`."""
        o, lse_HT, *_ = self.function(
            q_THD,
            k_PSGD,
            v_PSGE,
            page_table=prepared.pages_BP,
            cu_seqlens_q=prepared.first_rows,
            max_seqlen_q=prepared.longest,
            softmax_scale=scale,
            # A single query sees all keys that are here, on whichever rank they are.
            causal=prepared.longest > 1 or back is not None,
            window_size=self.everything if back is None else (back, 0),
            softcap=softcap or 0.0,
            **{self.keys: prepared.keys, self.lse: True},
        )
        return o, lse_HT.transpose(0, 1)


def flash_attention_3() -> FlashAttention:
    """FlashAttention 3.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    function = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    names = "cache_seqlens", "return_softmax_lse", (-1, -1)
    return FlashAttention("FlashAttention 3", function, 256, *names)


def flash_attention_4() -> FlashAttention:
    """FlashAttention 4, which is written in CuTe.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    function = importlib.import_module("flash_attn.cute.interface").flash_attn_varlen_func
    names = "seqused_k", "return_lse", (None, None)
    return FlashAttention("FlashAttention 4", function, 128, *names)
