"""Attention over pages in Triton: keys and values are read where they lie, and nothing is widened in memory.

One program computes a tile: some neighbouring queries of one sequence and some of the heads that share a
key-value head, over its pages, with the online softmax (arXiv 1805.02867). It gives the log-sum-exp, so that
parts merge. Values may be narrower than keys, and a sequence's pages dealt out among ranks.

Letters: T queries, H query and G key-value heads, R = H/G; D dimensions of keys, E of values; P pages of S
positions; N tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_megatron.core.device import on_device
from helix_megatron.core.kernels.paged import PagedStep

NAME = "Triton"
ROWS = 16  # of a tile at least: what a tensor core takes
MOST_ROWS = (
    64  # of a tile; heads of more than 256 dimensions have no registers for more than `ROWS`
)
KEYS = 64  # that are looked at together, as far as a page has them; half of them from 129 dimensions on
QUERIES = 16  # neighbours of a chunk in a tile
FAR = 1 << 30
FIELDS = 7  # of a tile, see `Tiles`
DIMS = range(16, 577)


class Tiles(NamedTuple):
    """What the programs of one step and window work on.

    Args:
        table_NF: int32 [N, 7]: row of the page table, first query, number of queries, position of the first,
            number of keys, first page that is seen, first block among those of the whole sequence.
        pages_BP: int32 [pieces, pages].
        queries: of a tile at most.
        every: which of the sequence's blocks are here: one of so many.
    """

    table_NF: Tensor
    pages_BP: Tensor
    queries: int
    every: int


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    tile_ptr,
    page_ptr,
    q_t,
    q_h,
    k_p,
    k_s,
    k_g,
    v_p,
    v_s,
    v_g,
    o_t,
    o_h,
    lse_t,
    page_b,
    scale,
    softcap,
    back,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    S: tl.constexpr,
    KEYS: tl.constexpr,
    EVERY: tl.constexpr,
    ROWS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    tile = tile_ptr + tl.program_id(0) * 7
    g = tl.program_id(1)
    sequence, first, count, start = (
        tl.load(tile),
        tl.load(tile + 1),
        tl.load(tile + 2),
        tl.load(tile + 3),
    )
    keys, page, block = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    row = tl.arange(0, ROWS)
    query, shared = row // HEADS, tl.program_id(2) * HEADS + row % HEADS
    own, head = (query < count) & (shared < R), g * R + shared
    at = start + query
    d1, e, s = tl.arange(0, D1), tl.arange(0, EP), tl.arange(0, KEYS)
    q_row = q_ptr + (first + query).to(tl.int64) * q_t + head * q_h
    q1 = tl.load(q_row[:, None] + d1[None], mask=own[:, None], other=0.0)
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        q2 = tl.load(q_row[:, None] + d2[None], mask=own[:, None] & (d2 < D)[None], other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, EP], tl.float32)
    for step in range(page * (S // KEYS), tl.cdiv(keys, KEYS)):
        p, slot = step // (S // KEYS), step % (S // KEYS) * KEYS + s
        place = tl.load(page_ptr + sequence * page_b + p).to(tl.int64)
        there = p * S + slot < keys
        k_row = k_ptr + place * k_p + slot * k_s + g * k_g
        k1 = tl.load(k_row[None] + d1[:, None], mask=there[None], other=0.0)
        x = tl.dot(q1, k1)
        if D2 > 0:
            k2 = tl.load(k_row[None] + d2[:, None], mask=there[None] & (d2 < D)[:, None], other=0.0)
            x += tl.dot(q2, k2)
        x *= scale
        if CAPPED:  # tanh by exponentials: both ends are exact
            x = softcap * (1 - 2 / (1 + tl.exp(2 * x / softcap)))
        position = (block + p * EVERY) * S + slot
        seen = (
            there[None] & (position[None] <= at[:, None]) & (position[None] >= at[:, None] - back)
        )
        x = tl.where(seen, x, float("-inf"))
        above = tl.maximum(largest, tl.max(x, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        shrink, weight = tl.exp(largest - safe), tl.exp(x - safe[:, None])
        v_row = v_ptr + place * v_p + slot * v_s + g * v_g
        v = tl.load(v_row[:, None] + e[None], mask=there[:, None] & (e < E)[None], other=0.0)
        total = total * shrink + tl.sum(weight, 1)
        sums = sums * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        largest = above
    blind = total == 0
    o = tl.where(blind[:, None], 0.0, sums / tl.where(blind, 1.0, total)[:, None])
    lse = tl.where(blind, float("-inf"), largest + tl.log(tl.where(blind, 1.0, total)))
    o_row = o_ptr + (first + query).to(tl.int64) * o_t + head * o_h
    tl.store(o_row[:, None] + e[None], o.to(o_ptr.dtype.element_ty), own[:, None] & (e < E)[None])
    tl.store(lse_ptr + (first + query).to(tl.int64) * lse_t + head, lse, own)


def attend(
    q_THD: Tensor,
    k_PSGD: Tensor,
    v_PSGE: Tensor,
    prepared: Tiles,
    *,
    scale: float,
    softcap: float | None = None,
    back: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `PagedKernel`."""
    heads, groups = q_THD.size(1), k_PSGD.size(2)
    o = torch.zeros(*q_THD.shape[:2], v_PSGE.size(-1), dtype=q_THD.dtype, device=q_THD.device)
    lse = torch.full(q_THD.shape[:2], float("-inf"), dtype=torch.float32, device=q_THD.device)
    table, pages = prepared.table_NF, prepared.pages_BP
    if not len(table):
        return o, lse
    settings, options = constants(q_THD, k_PSGD, v_PSGE, prepared, softcap is not None)
    _attend[(len(table), groups, -(-heads // groups // settings["HEADS"]))](
        q_THD,
        k_PSGD,
        v_PSGE,
        o,
        lse,
        table,
        pages,
        *q_THD.stride()[:2],
        *k_PSGD.stride()[:3],
        *v_PSGE.stride()[:3],
        *o.stride()[:2],
        heads,
        pages.stride(0),
        scale,
        softcap or 1.0,
        FAR if back is None else back,
        **settings,
        **options,
    )
    return o, lse


def constants(
    q_THD: Tensor, k_PSGD: Tensor, v_PSGE: Tensor, tiles: Tiles, capped: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    """What the kernel is compiled for, and with how many warps and stages."""
    d, e, size = q_THD.size(-1), v_PSGE.size(-1), k_PSGD.size(1)
    share = q_THD.size(1) // k_PSGD.size(2)
    first = 1 << (d.bit_length() - 1)  # the largest power of two in d; the rest is a second product
    rest, wide = d - first, max(d, e) > 256
    heads = min(share, max(1, (ROWS if wide else MOST_ROWS) // tiles.queries))
    settings = {
        "R": share,
        "HEADS": heads,
        "D": d,
        "D1": first,
        "D2": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "E": e,
        "EP": triton.next_power_of_2(e),
        "S": size,
        "KEYS": min(size, KEYS if max(d, e) <= 128 else KEYS // 2),
        "EVERY": tiles.every,
        "ROWS": max(ROWS, triton.next_power_of_2(tiles.queries * heads)),
        "CAPPED": capped,
    }
    few_rows = settings["ROWS"] == ROWS
    return settings, {"num_warps": 8 if max(d, e) > 128 and few_rows else 4, "num_stages": 2}


def fits(step: PagedStep, back: int | None) -> bool:
    """Whether the kernel computes such a step: any."""
    return True


def prepare(step: PagedStep, back: int | None) -> Tiles:
    """The tiles of a step. A sequence's blocks may be dealt out among ranks, every so many-th of them here."""
    size = step.page_size
    queries = min(QUERIES, 1 << (step.longest - 1).bit_length())
    rows, every = [], 1
    for number, piece in enumerate(step.pieces):
        keys, block = len(piece.positions), int(piece.positions[0]) // size
        if keys > size:
            every = int(piece.positions[size]) // size - block
        seen = piece.first_visible(back) // size
        for at in range(*piece.rows, queries):
            count, start = min(queries, piece.rows[1] - at), piece.start + at - piece.rows[0]
            rows.append((number, at, count, start, keys, seen, block))
    table = np.asarray(rows, dtype=np.int32).reshape(-1, FIELDS)
    return Tiles(on_device(table, step.device), step.pages_BP, queries, every)


def takes(q_THD: Tensor, k_PSGD: Tensor, v_PSGE: Tensor) -> bool:
    """Whether the kernel computes such heads and pages: half precision or fp32, pages of a power of two."""
    size, dims = k_PSGD.size(1), (q_THD.size(-1), v_PSGE.size(-1))
    fits = size >= 16 and size & (size - 1) == 0 and all(d in DIMS for d in dims)
    return fits and q_THD.dtype in (torch.float32, torch.bfloat16, torch.float16)
