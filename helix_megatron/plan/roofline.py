"""Seconds of one kernel on one chip: matrix products in waves of tiles, attention fused or not, streams."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from helix_megatron import attention_rates as rates
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
    score-reduce); 0 elsewhere. positions: keys that a query can see at most. kernel: what computes it
    (`attention_rates`).
    """

    flops: float
    batch_heads: float
    queries: float
    keys: float
    head_dim: int
    grouped: bool
    positions: float
    score_bytes: float = 0.0
    kernel: str = "cudnn"

    @property
    def fused(self) -> bool:
        """Whether scores stay on the chip."""
        return self.kernel not in rates.WRITING and not self.score_bytes


def attention_seconds(
    chip: hw.Chip,
    work: AttentionWork,
    *,
    dropout: bool = False,
    precision: str = "bf16",
) -> tuple[float, float]:
    """(forward, backward) of core attention in bf16 or fp32."""
    if not work.flops:
        return 0.0, 0.0
    if not work.fused:
        return _unfused(chip, work, precision, dropout)
    if work.kernel == rates.CPU_KERNEL:
        rate = chip.flops[precision] * chip.sustained[precision]
        forward, backward = rate, rate
    else:
        grouped, shape = work.grouped, (work.kernel, chip, work.head_dim, work.positions)
        forward, backward = (
            rates.attention_rate(*shape, causal=True, grouped=grouped, backward=back)
            for back in (False, True)
        )
    # A block of 128 queries for each multiprocessor keeps the chip busy.
    busy = min(1.0, work.batch_heads * math.ceil(work.queries / 128) / chip.units)
    busy = max(busy, 1 / chip.units)
    more = hw.ATTENTION_BACKWARD_FLOPS * work.flops
    return (
        work.flops / (forward * busy) + chip.launch,
        more / (backward * busy) + 2 * chip.launch,
    )


def decode_seconds(chip: hw.Chip, cache_bytes: float, score_bytes: float = 0.0) -> float:
    """Attention of one new token per sequence: the time to read the cache."""
    rate = chip.memory_bandwidth * hw.DECODE_CACHE_EFFICIENCY
    return hw.DECODE_ATTENTION_START + (cache_bytes + hw.SCORE_PASSES * score_bytes) / rate


def _unfused(
    chip: hw.Chip, work: AttentionWork, precision: str, dropout: bool
) -> tuple[float, float]:
    """Two batched products with every score computed and written, whatever the mask hides."""
    if work.score_bytes or work.kernel == "math":  # in fp32, whatever the model's precision
        wide = "fp32" in chip.flops
        rate = chip.flops["fp32"] if wide else chip.flops[precision] * hw.FP32_SHARE
        pairs = work.batch_heads * work.queries * work.keys
        # torch computes all pairs, and the exchange only those that can be seen.
        flops, written = (
            (work.flops, work.score_bytes)
            if work.score_bytes
            else (
                4 * pairs * work.head_dim,
                4 * pairs,
            )
        )
        passes = stream_seconds(chip, hw.SCORE_PASSES * written, hw.SCORE_PASSES)
        return flops / rate + passes, 2 * (flops / rate + passes)
    sizes = (work.queries, work.keys, work.head_dim)
    scores = gemm_seconds(chip, *sizes, precision, work.batch_heads)
    values = gemm_seconds(chip, sizes[0], sizes[2], sizes[1], precision, work.batch_heads)
    written = (4.0 if precision == "fp32" else 2.0) * work.batch_heads * work.queries * work.keys
    dropped = hw.DROPOUT_PASSES if dropout else 0.0
    forward = scores + values + stream_seconds(chip, written * (hw.SOFTMAX_PASSES + dropped), 2)
    passes = stream_seconds(chip, written * (hw.BACKWARD_PASSES + dropped), 2)
    return forward, 2 * (scores + values) + passes
