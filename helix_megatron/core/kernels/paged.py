"""Which kernels compute attention over pages, and why not others.

On a GPU the first of those that are installed and take a layer's heads, its pages and the step reads keys and
values where they lie: FlashAttention's (`paged_flash`), FlashInfer's (`paged_flashinfer`) or Triton's
(`paged_triton`). None is relied upon unseen: before it is first used for heads and pages of a kind it computes
a small step on the device, which is compared with torch's (`agrees`). Elsewhere pages that are no neighbours
are copied, and torch computes (`partial`).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from helix_megatron.core.device import on_device
from helix_megatron.core.kernels.partial import unfused
from helix_megatron.core.masks import shown

# By major compute capability, the first one that fits is taken; `paged_triton` comes after them everywhere.
INSTALLED = {
    8: ("FlashInfer",),
    9: ("FlashAttention 3", "FlashAttention 4", "FlashInfer"),
    10: ("FlashAttention 4", "FlashInfer"),
}
# Where they are made: (module of this package, function, what is imported).
MAKERS = {
    "FlashAttention 3": ("paged_flash", "flash_attention_3"),
    "FlashAttention 4": ("paged_flash", "flash_attention_4"),
    "FlashInfer": ("paged_flashinfer", "flashinfer"),
}
# Largest difference from torch in fp32, of the largest value, some ten times what rounding makes (fp32's in
# TF32). A wrong mask, page or logarithm makes a tenth and more.
ALLOWED = {torch.float32: 5e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class LocalPiece:
    """Consecutive queries of one sequence, and its keys in this rank's pool.

    rows: first and last+1 of the queries; start: position of the first.
    pages: of the keys; those that lie before the window may be freed ones.
    positions: of the keys, ascending, as they lie in the pages, none after the last query.
    """

    rows: tuple[int, int]
    start: int
    pages: Sequence[int]
    positions: np.ndarray

    @property
    def count(self) -> int:
        """How many queries it has."""
        return self.rows[1] - self.rows[0]

    def first_visible(self, back: int | None) -> int:
        """Index of the first key that the first query may see; later queries see none before it.

        Args:
            back: how many positions a query sees before itself; None: all.
        """
        return 0 if back is None else int(np.searchsorted(self.positions, self.start - back))


class PagedStep:
    """What a rank attends to in a step: made once, for all layers and kernels.

    Args:
        pieces: of this rank, none without keys.
        queries: of this rank. One that has no piece sees no key.
        page_size: positions of a page.
    """

    def __init__(
        self,
        pieces: Sequence[LocalPiece],
        queries: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        self.pieces, self.queries, self.page_size, self.device = pieces, queries, page_size, device
        ends = [0, *(piece.rows[1] for piece in pieces)]
        starts = [*(piece.rows[0] for piece in pieces), queries]
        self.covered = ends == starts
        """Whether each query has a piece, in their order."""
        self.whole = all(len(p.positions) == p.start + p.count for p in pieces)
        """Whether all keys of the sequences up to the last query are here, none of them elsewhere."""

    @cached_property
    def longest(self) -> int:
        """Queries of the largest piece."""
        return max((piece.count for piece in self.pieces), default=1)

    @cached_property
    def keys(self) -> np.ndarray:
        """int32 [pieces], how many keys each has."""
        return np.array([len(piece.positions) for piece in self.pieces], dtype=np.int32)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """int32 [pieces + 1], the first query of each and the end of the last, where all are covered."""
        return np.array([0, *(piece.rows[1] for piece in self.pieces)], dtype=np.int32)

    @cached_property
    def pages_BP(self) -> Tensor:
        """int32 [pieces, pages] on the device; 0 behind the last page of a piece, and where a page is freed."""
        width = max((len(piece.pages) for piece in self.pieces), default=1)
        pages = np.zeros((len(self.pieces), width), dtype=np.int32)
        for row, piece in zip(pages, self.pieces, strict=True):
            row[: len(piece.pages)] = np.maximum(piece.pages, 0)
        return on_device(pages, self.device)

    def is_plain(self, back: int | None) -> bool:
        """Whether a query sees its sequence's last keys here, and as many less as queries come after it.

        That is how kernels that know no positions align queries and keys.
        """
        alone = self.longest == 1 and back is None
        return self.covered and bool(self.pieces) and (self.whole or alone)


class PagedKernel(Protocol):
    """Attention over pages. It adds no sinks: its log-sum-exp lets them be added, and parts be merged."""

    NAME: str

    def __hash__(self) -> int:
        """A kernel equals nothing but itself."""

    def takes(self, q_THD: Tensor, k_PSGD: Tensor, v_PSGE: Tensor) -> bool:
        """Whether it computes such heads and pages."""

    def fits(self, step: PagedStep, back: int | None) -> bool:
        """Whether it computes such a step."""

    def prepare(self, step: PagedStep, back: int | None) -> Any:
        """What `attend` needs of a step, alike for all layers that see as far back."""

    def attend(
        self,
        q_THD: Tensor,
        k_PSGD: Tensor,
        v_PSGE: Tensor,
        prepared: Any,
        *,
        scale: float,
        softcap: float | None = None,
        back: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of a step's queries to the keys in this rank's pages.

        Args:
            scale, softcap: as in `Scores`.
            back: positions that a query sees before itself; None: all.

        Returns:
            o [T, H, E], lse [T, H] in fp32, natural logarithms; 0 and -inf for a query that sees no key.
        """


@dataclass(frozen=True)
class Kernels:
    """The kernels for a device, the one to be preferred first, and a sentence for people."""

    kernels: tuple[PagedKernel, ...]
    text: str


@functools.cache
def paged_kernels(device: str) -> Kernels:
    """The kernels for devices of a type, looked for once per process; never raises."""
    if device != "cuda" or not torch.cuda.is_available():
        return Kernels((), "Attention over pages by torch: other kernels need a GPU.")
    found: list[PagedKernel] = []
    reasons = []
    for name in (*INSTALLED.get(torch.cuda.get_device_capability()[0], ()), "Triton"):
        try:
            found.append(_make(name))
        except ModuleNotFoundError:
            reasons.append(f"{name} is not installed")
        except (Exception, SystemExit) as error:  # whatever a build for another torch or CUDA does
            reasons.append(f"{name} cannot be used ({type(error).__name__}: {error!s:.200})")
    names = ", ".join(kernel.NAME for kernel in found)
    text = f"Attention over pages by {names or 'torch, which copies them'}"
    if found:
        text += ": the first that takes a layer's heads and pages and the step; by torch where none does"
    return Kernels(tuple(found), text + "".join(f"; {reason}" for reason in reasons) + ".")


def _make(name: str) -> PagedKernel:
    module, function = MAKERS.get(name, ("paged_triton", ""))
    made: Any = importlib.import_module(f"helix_megatron.core.kernels.{module}")
    return getattr(made, function)() if function else made


# ------------------------------------------------------------------------- compared with torch


class Kind(NamedTuple):
    """Heads and pages of a layer, and what it makes of scores: H query and G key-value heads."""

    heads: int
    groups: int
    key_dim: int
    value_dim: int
    page_size: int
    dtype: torch.dtype
    windowed: bool = False
    capped: bool = False


@functools.cache
def agrees(kernel: PagedKernel, kind: Kind, device: torch.device) -> bool:
    """Whether a kernel gives what torch gives, tried once for each kind; if not, it is said once."""
    try:
        error = largest_error(kernel, kind, device)
        if error <= ALLOWED[kind.dtype]:
            return True
        reason = f"its results differ from torch's by {error:.1e} of the largest"
    except Exception as problem:  # a kernel that does not compile, or refuses its arguments
        reason = f"{type(problem).__name__}: {problem!s:.200}"
    warnings.warn(
        f"{kernel.NAME} is not used for {kind.heads} query and {kind.groups} key-value heads of {kind.key_dim} "
        f"and {kind.value_dim} dimensions in pages of {kind.page_size}: {reason}.",
        stacklevel=2,
    )
    return False


class NotTakenError(Exception):
    """A kernel does not compute heads and pages of a kind."""


def largest_error(kernel: PagedKernel, kind: Kind, device: torch.device) -> float:
    """The largest difference of outputs and log-sum-exps from torch's in fp32, of the largest value.

    Of two steps, in pages out of order: one of single queries alone, and one with chunks, at the beginning of
    sequences and later.

    Raises:
        NotTakenError: the kernel says that it does not compute this.
    """
    alone = (37, 1), (6, 1), (2 * kind.page_size + 3, 1)  # positions before the queries, queries
    steps = alone, (*alone, (0, 21), (2 * kind.page_size + 3, 5))
    return max(_largest_error(kernel, kind, device, lengths) for lengths in steps)


def _largest_error(
    kernel: PagedKernel, kind: Kind, device: torch.device, lengths: Sequence[tuple[int, int]]
) -> float:
    size, random = kind.page_size, torch.Generator().manual_seed(5)
    pieces, row, page = [], 0, sum(-(-(before + count) // size) for before, count in lengths)
    shape = (kind.groups, page, size)
    k, v = (
        torch.randn(*shape, dims, generator=random).to(device, kind.dtype).permute(1, 2, 0, 3)
        for dims in (kind.key_dim, kind.value_dim)
    )
    for before, count in lengths:
        own = -(-(before + count) // size)
        pages = [page - 1 - number for number in range(own)]
        pieces.append(LocalPiece((row, row + count), before, pages, np.arange(before + count)))
        row, page = row + count, page - own
    q = torch.randn(row, kind.heads, kind.key_dim, generator=random).to(device, kind.dtype)
    if not kernel.takes(q, k, v):
        raise NotTakenError
    step = PagedStep(pieces, row, size, device)
    back, softcap = 9 if kind.windowed else None, 5.0 if kind.capped else None
    how: dict[str, Any] = {"scale": kind.key_dim**-0.5, "softcap": softcap}
    o, lse = kernel.attend(q, k, v, kernel.prepare(step, back), back=back, **how)
    errors = []
    for piece in pieces:
        rows, keys = slice(*piece.rows), len(piece.positions)
        query = np.arange(piece.start, piece.start + piece.count)[:, None]
        window = None if back is None else (back, 0)
        seen = on_device(shown(query, piece.positions[None], causal=True, window=window), device)
        bias = torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))
        own_k, own_v = (
            pool[torch.tensor(piece.pages, device=device)]
            .flatten(0, 1)[:keys]
            .float()
            .permute(1, 0, 2)[None]
            for pool in (k, v)
        )
        wanted = unfused(q[rows].float().transpose(0, 1)[None], own_k, own_v, bias, **how)
        for given, one in zip((o, lse), (part[0].transpose(0, 1) for part in wanted), strict=True):
            difference = (given[rows].float() - one).abs().max() / one.abs().max()
            errors.append(difference.nan_to_num(nan=float("inf")).item())
    return max(errors)
