"""Attention kernels beyond torch's own that may be installed; `sdpa` takes them where they fit.

FlashAttention 3, 4   run inside `scaled_dot_product_attention` once torch has activated one for the process
ffpa-attn             takes its place for heads of 257 to 512 dimensions, which torch has no fast kernel for
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

# torch's name of an implementation: what users call it, its module, and its widest head.
FLASH = {
    "FA3": ("FlashAttention 3", "flash_attn_interface", 256),
    "FA4": ("FlashAttention 4", "flash_attn.cute.interface", 128),
}
# By major compute capability, the fastest first.
FLASH_OF_GPU = {9: ("FA3", "FA4"), 10: ("FA4",)}
WIDE = range(257, 513)
HALF = (torch.float16, torch.bfloat16)
_WITHOUT_FLASH = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class InstalledKernels:
    """What was found.

    flash: torch's names of the FlashAttention that runs on this GPU, the fastest first.
    wide: ffpa-attn's function with the arguments of `scaled_dot_product_attention`, whose causality is aligned
        at the last query and the last key; or None.
    reasons: why the others cannot be used, as the rest of a sentence.
    """

    flash: tuple[str, ...]
    wide: Callable[..., Tensor] | None
    reasons: Mapping[str, str]

    def summary(self) -> str:
        """One line: what there is beside torch's own kernels, and why the rest is not."""
        found = [FLASH[name][0] for name in self.flash] + ["ffpa-attn"] * (self.wide is not None)
        missing = [f"{name} {reason}" for name, reason in self.reasons.items()]
        beside = f" with {', '.join(found)}" if found else ""
        rest = f" ({', '.join(missing)})" if missing else ""
        return f"Kernels of attention here: torch's scaled_dot_product_attention{beside}{rest}."

    def takes(self, q_BHLD: Tensor, v_BGSE: Tensor, dropout: float) -> bool:
        """Whether `wide` computes attention of these heads, if no pattern is to be masked."""
        dims = q_BHLD.size(-1)
        fits = dims in WIDE and v_BGSE.size(-1) == dims and q_BHLD.dtype in HALF and not dropout
        return self.wide is not None and fits

    def flash_for(self, q_BHLD: Tensor, dropout: float) -> AbstractContextManager[None]:
        """Enter around torch's function: it runs FlashAttention where that can compute such heads.

        An implementation that is active takes all calls of torch's own FlashAttention, and refuses dropout and
        wider heads: for those it is left out.
        """
        dims = q_BHLD.size(-1)
        active = torch_attention.current_flash_attention_impl()
        if active is None and not dropout and q_BHLD.dtype in HALF:
            fitting = (name for name in self.flash if dims <= FLASH[name][2])
            active = next((name for name in fitting if _activate(name)), None)
        if active in FLASH and (dropout or dims > FLASH[active][2]):
            return sdpa_kernel(_WITHOUT_FLASH)
        return nullcontext()


@functools.cache
def installed_kernels() -> InstalledKernels:
    """Look for the optional kernels, once per process; never raises."""
    on_gpu = torch.cuda.is_available()
    runs = FLASH_OF_GPU.get(torch.cuda.get_device_capability()[0], ()) if on_gpu else ()
    reasons = {}
    for key, (name, module, _) in FLASH.items():
        reasons[name] = _why_not(module, "flash_attn_func")
        if not reasons[name] and key not in runs:
            reasons[name] = "does not run on this GPU" if on_gpu else "needs a CUDA device"
    reasons["ffpa-attn"] = _why_not("ffpa_attn", "ffpa_attn_func")
    if not reasons["ffpa-attn"] and not on_gpu:
        reasons["ffpa-attn"] = "needs a CUDA device"
    wide = None if reasons["ffpa-attn"] else importlib.import_module("ffpa_attn").ffpa_attn_func
    flash = tuple(key for key in runs if not reasons[FLASH[key][0]])
    return InstalledKernels(flash, wide, {name: why for name, why in reasons.items() if why})


def _why_not(module: str, function: str) -> str:
    try:
        getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return "not found"
        return f"cannot be imported ({error})"
    except (Exception, SystemExit) as error:  # whatever a build for another torch or CUDA does
        return f"cannot be imported ({type(error).__name__}: {error})"
    return ""


@functools.cache
def _activate(name: str) -> bool:
    """Whether torch could activate an implementation, for the whole process; if not, it is said once."""
    try:
        torch_attention.activate_flash_attention_impl(name)
    except Exception as error:
        warnings.warn(
            f"{FLASH[name][0]} is installed and torch cannot activate it ({type(error).__name__}: {error}); "
            "attention goes on without it.",
            stacklevel=2,
        )
        return False
    return True
