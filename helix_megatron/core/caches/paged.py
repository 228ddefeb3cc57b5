"""Attention of a step's queries to the keys and values in this rank's pages."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helix_megatron.core.device import on_device
from helix_megatron.core.kernels.paged import (
    Kind,
    LocalPiece,
    PagedKernel,
    PagedStep,
    agrees,
    paged_kernels,
)
from helix_megatron.core.kernels.partial import PartialKernel, partial_kernel, unfused
from helix_megatron.core.masks import shown

Window = tuple[int, int] | None
# On a CPU a long run of neighbouring pages is read where it lies; on a GPU one kernel for many short sequences
# is worth a copy.
VIEW_FROM = {"cpu": 256}
# Positions of all sequences that are copied out together: on a CPU no more than its caches hold.
COPY_UP_TO = {"cpu": 2048}
NEVER = 1 << 62


@dataclass(frozen=True)
class KeptHeads:
    """What a rank keeps of one layer.

    Args:
        pages: of the layer's pool.
        heads: key-value heads.
        key_dim, value_dim: dimensions of a key, and of a value.
        latent: whether a value is the first dimensions of its key, and kept with it only.
        kind: which of the books has the layer's pages, where there are two (`windows.BookPair`).
    """

    pages: int
    heads: int
    key_dim: int
    value_dim: int
    latent: bool = False
    kind: int = 0

    @property
    def position_size(self) -> int:
        """Elements that one position takes."""
        return self.heads * (self.key_dim + (0 if self.latent else self.value_dim))


class PagedCache:
    """Keys and values of one rank: k[layer] [pages, page_size, G, D], v[layer] [pages, page_size, G, E].

    In memory each head's positions lie one after the other: a query head reads one key-value head only.

    Args:
        layers: what each layer keeps.
        page_size: positions of a page.
    """

    def __init__(
        self,
        layers: Sequence[KeptHeads],
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers, self.page_size, self.dtype, self.device = layers, page_size, dtype, device
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        for kept in layers:
            shape = (kept.heads, kept.pages, page_size)
            key = _zeros((*shape, kept.key_dim), dtype, device).permute(1, 2, 0, 3)
            self.k.append(key)
            if kept.latent:
                self.v.append(key[..., : kept.value_dim])
            else:
                value = _zeros((*shape, kept.value_dim), dtype, device).permute(1, 2, 0, 3)
                self.v.append(value)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(kept.pages * kept.position_size for kept in self.layers) * self._page_elements

    @property
    def _page_elements(self) -> int:
        return self.page_size * self.dtype.itemsize

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """Bytes of a page of each kind of layers: keys and values of all layers of that kind."""
        kinds = range(1 + max(kept.kind for kept in self.layers))
        return tuple(
            sum(kept.position_size for kept in self.layers if kept.kind == kind)
            * self._page_elements
            for kind in kinds
        )

    def write(self, layer: int, slots: Tensor, k_TGD: Tensor, v_TGE: Tensor) -> None:
        """Put new keys and values into their slots, int64 [T]; of a latent the key is all."""
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k_TGD)
        if not self.layers[layer].latent:
            self.v[layer].flatten(0, 1).index_copy_(0, slots, v_TGE)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; a CPU's memory is taken when it is first written to. What is hidden by a bias must be a number."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    storage = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(storage).view(dtype).view(shape)


@dataclass(frozen=True)
class _Item:
    """Some queries and where their keys lie: a run of slots, or pages to copy out.

    rows: int64 [B, L] queries. slots: (start, stop) of the keys; or pages: int64 [B, P], of which the positions
    keys: (first, stop) are read.
    bias: [B or 1, 1, L, S] or None; blind: bool [B, L] where no key is visible, or None.
    """

    rows: Tensor
    slots: tuple[int, int] | None
    pages: Tensor | None
    keys: tuple[int, int]
    bias: Tensor | None
    blind: Tensor | None


class PagedWork:
    """The attention of one step, prepared once and run in every layer.

    Args:
        pieces: of this rank. A query that has no piece gets zeros.
        queries: number of queries of this rank.
        page_size: positions of a page.
        windows: those of the layers, where they are known; another one is prepared by the layer that has it.
    """

    def __init__(
        self,
        pieces: Sequence[LocalPiece],
        queries: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        windows: Collection[Window] = (),
    ) -> None:
        self.pieces, self.queries, self.page_size = pieces, queries, page_size
        self._dtype, self._device = dtype, device
        self._kernel: PartialKernel = partial_kernel(device)
        self._view_from = VIEW_FROM.get(device.type, NEVER)
        self._copy_up_to = COPY_UP_TO.get(device.type, NEVER)
        self._step = PagedStep(pieces, queries, page_size, device)
        self._kernels = paged_kernels(device.type).kernels
        self._chosen: dict[tuple[Kind, Window], PagedKernel | None] = {}
        self._prepared: dict[Window, list[_Item]] = {}
        self._given: dict[tuple[PagedKernel, Window], Any] = {}
        for window in windows:
            fitting = (k for k in self._kernels if k.fits(self._step, _back(window)))
            if (
                first := next(fitting, None)
            ) is not None:  # others are prepared where it takes no such layer
                self._given_to(first, window)
            if not self._kernels:
                self._items(window)

    def attend(
        self,
        q_THD: Tensor,
        k_PSGD: Tensor,
        v_PSGE: Tensor,
        *,
        scale: float,
        window: Window,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of every query to its visible keys in one layer's pool.

        Args:
            q_THD: [queries, H, D].
            k_PSGD, v_PSGE: [pages, page_size, G, D].
            window, softcap: as in `Scores`.

        Returns:
            o [queries, H, E], lse [queries, H] in at least fp32; 0 and -inf for a query that sees no key.
        """
        if (chosen := self._kernel_for(q_THD, k_PSGD, v_PSGE, window, softcap)) is not None:
            given = self._given_to(chosen, window)
            how: dict[str, Any] = {"scale": scale, "softcap": softcap, "back": _back(window)}
            return chosen.attend(q_THD, k_PSGD, v_PSGE, given, **how)
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        items, kernel = self._items(window), self._kernel
        if softcap is not None or k_PSGD.size(-1) != v_PSGE.size(-1):
            kernel = functools.partial(unfused, softcap=softcap)  # the fused one knows neither
        if len(items) == 1 and items[0].blind is None and items[0].rows.numel() == self.queries:
            return self._attend(kernel, items[0], q_THD, k_PSGD, v_PSGE, scale)
        o = q_THD.new_zeros(*q_THD.shape[:2], v_PSGE.size(-1))
        lse = q_THD.new_full(q_THD.shape[:2], float("-inf"), dtype=wide)
        for item in items:
            part, part_lse = self._attend(kernel, item, q_THD, k_PSGD, v_PSGE, scale)
            rows = item.rows.flatten()
            o[rows], lse[rows] = part, part_lse
        return o, lse

    def _attend(
        self,
        kernel: PartialKernel,
        item: _Item,
        q_THD: Tensor,
        k_PSGD: Tensor,
        v_PSGE: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Of the queries of an item: [B·L, H, E] and [B·L, H]."""
        batch, length = item.rows.shape
        heads, groups = q_THD.size(1), k_PSGD.size(2)
        q_BLHD = q_THD[item.rows.flatten()].unflatten(0, (batch, length))
        k_BGSD, v_BGSE = self._keys(item, k_PSGD), self._keys(item, v_PSGE)
        if length == 1:  # the heads that share a key are the queries of one head: it is read once
            q = q_BLHD.squeeze(1).unflatten(1, (groups, heads // groups))
            o, lse = kernel(q, k_BGSD, v_BGSE, item.bias, scale)
            o, lse = o.flatten(1, 2), lse.flatten(1, 2)
        else:
            o, lse = kernel(q_BLHD.transpose(1, 2), k_BGSD, v_BGSE, item.bias, scale)
            o, lse = o.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        if item.blind is not None:
            blind = item.blind.flatten()
            o = o.masked_fill(blind[:, None, None], 0.0)
            lse = lse.masked_fill(blind[:, None], float("-inf"))
        return o, lse

    def _keys(self, item: _Item, pool_PSGD: Tensor) -> Tensor:
        """[B, G, S, D] of an item, a view where its pages are neighbours."""
        if item.slots is not None:
            start, stop = item.slots
            return pool_PSGD.flatten(0, 1)[start:stop].unsqueeze(0).transpose(1, 2)
        assert item.pages is not None
        batch, pages = item.pages.shape
        copied_GPSD = pool_PSGD.permute(2, 0, 1, 3).index_select(1, item.pages.flatten())
        first, last = item.keys
        keys_GBSD = copied_GPSD.view(-1, batch, pages * self.page_size, copied_GPSD.size(-1))
        return keys_GBSD[:, :, first:last].transpose(0, 1)

    # ---------------------------------------------------------------- preparation

    def _items(self, window: Window) -> list[_Item]:
        if window not in self._prepared:
            self._prepared[window] = self._prepare(window)
        return self._prepared[window]

    def _given_to(self, kernel: PagedKernel, window: Window) -> Any:
        """What a kernel that reads pages where they lie is given."""
        if (kernel, window) not in self._given:
            self._given[kernel, window] = kernel.prepare(self._step, _back(window))
        return self._given[kernel, window]

    def _kernel_for(
        self,
        q_THD: Tensor,
        k_PSGD: Tensor,
        v_PSGE: Tensor,
        window: Window,
        softcap: float | None,
    ) -> PagedKernel | None:
        """The first kernel that computes such a layer in this step; None where torch does."""
        if not self._kernels:
            return None
        kind = Kind(
            q_THD.size(1),
            k_PSGD.size(2),
            q_THD.size(2),
            v_PSGE.size(3),
            self.page_size,
            q_THD.dtype,
            _back(window) is not None,
            softcap is not None,
        )
        if (kind, window) not in self._chosen:
            self._chosen[kind, window] = next(
                (
                    kernel
                    for kernel in self._kernels
                    if kernel.fits(self._step, _back(window))
                    and kernel.takes(q_THD, k_PSGD, v_PSGE)
                    and agrees(kernel, kind, q_THD.device)
                ),
                None,
            )
        return self._chosen[kind, window]

    def _prepare(self, window: Window) -> list[_Item]:
        items: list[_Item] = []
        short: dict[int, list[tuple[LocalPiece, int]]] = {}
        for piece in self.pieces:
            first = piece.first_visible(_back(window))
            keys = len(piece.positions)
            if first >= keys:
                continue  # sees nothing here
            single = piece.rows[1] - piece.rows[0] == 1
            if single and not self._is_run(piece, first):
                pages = -(-keys // self.page_size) - first // self.page_size
                short.setdefault(1 << (pages - 1).bit_length(), []).append((piece, first))
            else:
                items.append(self._alone(piece, first, window))
        for pages, members in short.items():
            count = max(1, self._copy_up_to // (pages * self.page_size))
            items += [
                self._together(members[at : at + count]) for at in range(0, len(members), count)
            ]
        return items

    def _is_run(self, piece: LocalPiece, first: int) -> bool:
        pages = piece.pages[first // self.page_size :]
        neighbours = pages[-1] - pages[0] == len(pages) - 1 and (np.diff(pages) == 1).all()
        return bool(neighbours and len(piece.positions) - first >= self._view_from)

    def _alone(self, piece: LocalPiece, first: int, window: Window) -> _Item:
        size, keys = self.page_size, len(piece.positions)
        rows = torch.arange(*piece.rows, device=self._device).unsqueeze(0)
        bias, blind = None, None
        if rows.size(1) > 1:
            bias, blind = self._mask(piece, first, window)
        skipped = first // size
        if self._is_run(piece, first):
            at = (piece.pages[skipped] - skipped) * size
            return _Item(rows, (at + first, at + keys), None, (0, 0), bias, blind)
        pages = on_device(np.array([piece.pages[skipped : -(-keys // size)]]), self._device)
        return _Item(
            rows, None, pages, (first - skipped * size, keys - skipped * size), bias, blind
        )

    def _mask(self, piece: LocalPiece, first: int, window: Window) -> tuple[Tensor, Tensor | None]:
        """bias [1, 1, L, S] and blind [1, L] of a chunk: causal, inside the window."""
        query = np.arange(piece.start, piece.start + piece.rows[1] - piece.rows[0])[:, None]
        key = piece.positions[None, first:]
        visible = shown(query, key, causal=True, window=window)
        seen = np.asarray(visible.any(-1))
        blind = None if seen.all() else on_device(np.atleast_2d(~seen), self._device)
        return self._bias(visible[None, None]), blind

    def _together(self, members: list[tuple[LocalPiece, int]]) -> _Item:
        """One query each of several sequences with about as many pages."""
        size = self.page_size
        skipped = [first // size for _, first in members]
        begin = [first - skip * size for (_, first), skip in zip(members, skipped, strict=True)]
        end = [
            len(p.positions) - skip * size for (p, _), skip in zip(members, skipped, strict=True)
        ]
        width = max(-(-stop // size) for stop in end)
        pages = np.zeros((len(members), width), dtype=np.int64)
        for row, (piece, _) in enumerate(members):
            own = piece.pages[skipped[row] : skipped[row] + -(-end[row] // size)]
            pages[row, : len(own)] = own
        low, high = min(begin), max(end)
        bias = None
        if low != max(begin) or high != min(end):
            key = np.arange(low, high)[None]
            visible = (key >= np.asarray(begin)[:, None]) & (key < np.asarray(end)[:, None])
            bias = self._bias(visible[:, None, None])
        rows = on_device(np.array([[piece.rows[0]] for piece, _ in members]), self._device)
        return _Item(rows, None, on_device(pages, self._device), (low, high), bias, None)

    def _bias(self, visible: np.ndarray) -> Tensor:
        hidden = on_device(~visible, self._device)
        bias = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return bias.masked_fill_(hidden, float("-inf"))


def _back(window: Window) -> int | None:
    """How many positions a query sees before itself; None: all."""
    return None if window is None or window[0] < 0 else window[0]
