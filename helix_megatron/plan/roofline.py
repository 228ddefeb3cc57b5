"""Seconds of one kernel on one chip: matrix products in waves of tiles, attention fused or not, streams."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from helix_megatron import hardware as hw


@functools.lru_cache(maxsize=65536)
def gemm_seconds(
    chip: hw.Chip, rows: float, columns: float, inner: float, precision: str, batch: float = 1
) -> float:
    """`batch` products [rows, inner] × [inner, columns]; the best of a few tile shapes, in whole waves."""
    if rows <= 0 or columns <= 0 or inner <= 0 or batch <= 0:
        return 0.0
    peak = chip.flops[precision] * chip.sustained[precision]
    work = 2 * inner * chip.units / peak
    best = math.inf
    for height, width, share in hw.GEMM_TILES:
        tiles = math.ceil(rows / height) * math.ceil(columns / width) * batch
        waves = math.ceil(tiles / chip.units)
        # Too few tiles for the chip: the inner dimension is cut, and a second pass adds the parts.
        parts = max(1, min(int(chip.units // tiles), int(inner // hw.GEMM_SPLIT)))
        passes = 1 if parts == 1 else 2
        tile = height * width * work / share / parts
        best = min(best, waves * tile + (waves + passes - 1) * hw.GEMM_TILE_START)
    element = {"fp8": 1, "bf16": 2, "fp32": 4}[precision]
    moved = batch * (element * inner * (rows + columns) + max(element, 2) * rows * columns)
    return max(best, moved / (chip.memory_bandwidth * hw.MEMORY_EFFICIENCY)) + chip.launch


def stream_seconds(chip: hw.Chip, moved: float, kernels: int = 1) -> float:
    """Kernels that are bound by the bytes that they read and write."""
    return moved / (chip.memory_bandwidth * hw.MEMORY_EFFICIENCY) + kernels * chip.launch


class AttentionWork(NamedTuple):
    """Core attention of one rank, one layer: what an exchange leaves to compute.

    flops: of visible pairs, forward. score_bytes: scores written to memory by the exchange itself (fp32,
    score-reduce); 0 elsewhere. fusible: a fused kernel may exist. positions: keys that a query can see at most.
    """

    flops: float
    batch_heads: float
    queries: float
    keys: float
    head_dim: int
    grouped: bool
    positions: float
    score_bytes: float = 0.0
    fusible: bool = True

    def fused(self, widest: int) -> bool:
        """Whether a fused kernel for heads of up to `widest` dimensions does it; 0: there is none."""
        return self.fusible and self.head_dim <= widest


def attention_seconds(
    chip: hw.Chip,
    work: AttentionWork,
    *,
    widest: int,
    dropout: bool = False,
    precision: str = "bf16",
) -> tuple[float, float]:
    """(forward, backward) of core attention in bf16 or fp32."""
    if not work.flops:
        return 0.0, 0.0
    if work.fused(widest):
        forward = work.flops / attention_rate(chip, work, precision) + chip.launch
        scale = hw.ATTENTION_BACKWARD_FLOPS / hw.ATTENTION_BACKWARD_RATE
        return forward, (forward - chip.launch) * scale + 2 * chip.launch
    return _unfused(chip, work, precision, dropout)


def attention_rate(chip: hw.Chip, work: AttentionWork, precision: str = "bf16") -> float:
    """FLOP/s of a fused forward kernel."""
    peak, many, few = _attention_curve(work.head_dim)
    half = few if work.grouped else many
    rate = chip.flops[precision] * chip.sustained[precision] * peak
    busy = min(1.0, work.batch_heads * math.ceil(work.queries / 128) / chip.units)
    return rate * work.positions / (work.positions + half) * max(busy, 1 / chip.units)


def decode_seconds(chip: hw.Chip, cache_bytes: float, score_bytes: float = 0.0) -> float:
    """Attention of one new token per sequence: the time to read the cache."""
    rate = chip.memory_bandwidth * hw.DECODE_CACHE_EFFICIENCY
    return hw.DECODE_ATTENTION_START + (cache_bytes + hw.SCORE_PASSES * score_bytes) / rate


@functools.lru_cache(maxsize=256)
def _attention_curve(head_dim: int) -> tuple[float, float, float]:
    """Interpolated linearly over head dimensions."""
    dims = sorted(hw.ATTENTION_CURVE)
    if head_dim <= dims[0]:
        peak, many, few = hw.ATTENTION_CURVE[dims[0]]
        return peak * head_dim / dims[0], many, few
    if head_dim >= dims[-1]:
        return hw.ATTENTION_CURVE[dims[-1]]
    above = next(d for d in dims if d >= head_dim)
    below = max(d for d in dims if d < head_dim)
    weight = (head_dim - below) / (above - below)
    pairs = zip(hw.ATTENTION_CURVE[below], hw.ATTENTION_CURVE[above], strict=True)
    peak, many, few = ((1 - weight) * low + weight * high for low, high in pairs)
    return peak, many, few


def _unfused(
    chip: hw.Chip, work: AttentionWork, precision: str, dropout: bool
) -> tuple[float, float]:
    """Two batched products with every score computed and written, whatever the mask hides."""
    if work.score_bytes:  # the exchange's own scores, always in fp32
        wide = "fp32" in chip.flops
        rate = chip.flops["fp32"] if wide else chip.flops[precision] * hw.FP32_SHARE
        products = work.flops / rate
        passes = stream_seconds(chip, hw.SCORE_PASSES * work.score_bytes, hw.SCORE_PASSES)
        return products + passes, 2 * (products + passes)
    sizes = (work.queries, work.keys, work.head_dim)
    scores = gemm_seconds(chip, *sizes, precision, work.batch_heads)
    values = gemm_seconds(chip, sizes[0], sizes[2], sizes[1], precision, work.batch_heads)
    written = (4.0 if precision == "fp32" else 2.0) * work.batch_heads * work.queries * work.keys
    dropped = hw.DROPOUT_PASSES if dropout else 0.0
    forward = scores + values + stream_seconds(chip, written * (hw.SOFTMAX_PASSES + dropped), 2)
    passes = stream_seconds(chip, written * (hw.BACKWARD_PASSES + dropped), 2)
    return forward, 2 * (scores + values) + passes
