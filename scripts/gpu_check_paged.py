"""Compare kernels for attention over pages with torch, for gpu_check.py."""

from __future__ import annotations

from itertools import product
from typing import Any

DIMS = (64, 64), (128, 128), (192, 128), (256, 256)  # of keys and of values
PAGE_SIZES = (16, 64)


def differences(device: str) -> tuple[str, list[tuple[Any, ...]], bool]:
    """(which kernels there are, how much each differs from torch, whether all of it is allowed).

    A kernel need not take every kind of heads and pages: the engine then asks the next one. What it takes it
    must compute, and a GPU has at least one kernel.
    """
    import torch

    from helix_megatron.core.kernels.paged import (
        ALLOWED,
        Kind,
        NotTakenError,
        largest_error,
        paged_kernels,
    )

    found, rows = paged_kernels(device), []
    good = device == "cpu" or bool(found.kernels)
    for kernel, (d, e), size, more in product(found.kernels, DIMS, PAGE_SIZES, (False, True)):
        kind = Kind(8, 2, d, e, size, torch.bfloat16, windowed=more, capped=more)
        try:
            error = largest_error(kernel, kind, torch.device(device))
        except NotTakenError:
            text = "not taken"
        except Exception as problem:
            good = False
            text = f"{type(problem).__name__}: {str(problem)[:80]}, **failed**"
        else:
            right = error <= ALLOWED[kind.dtype]
            good &= right
            text = f"{error:.1e}, {'ok' if right else '**wrong**'}"
        rows.append((kernel.NAME, f"{d}, {e}", size, more, text))
    return found.text, rows, good
