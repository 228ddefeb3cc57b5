"""Every constant of the cost models, with its source. Nowhere else in this package is a rate written down.

The planner reads the detailed tables. The choice of an exchange or a cache layout, which must cost nothing
itself, reads a `Machine`: a roofline of five numbers.

Published specifications are taken as they are. Measured curves are a few rounded points or a fit of the public
tables of ai-dynamo/aiconfigurator (Apache-2.0; H100 SXM), named by their file: gemm_h100_sxm_bf16,
attention_prefill_h100_sxm, attention_decode_h100_sxm, nccl_h100_sxm. Other chips get the same curves, scaled by
their published peaks. The two tables of training runs (training_a100, training_h100_fp8) fix one number each:
the share of the curve that a chip sustains at that precision, `Chip.sustained`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

KIB, MIB = 1 << 10, 1 << 20

# ------------------------------------------------------------------------------ chips


@dataclass(frozen=True, eq=False)  # hashed by identity: it holds dictionaries
class Chip:
    """A GPU, by its data sheet; dense rates, no sparsity.

    flops: precision → FLOP/s. memory: bytes. memory_bandwidth: byte/s. units: streaming multiprocessors.
    sustained: precision → share of the curve of matrix products (`GEMM_*`) that long runs reach under the
        power limit; the only number of this package that was fitted to training runs.
    inference: the same for prefill and decode, whose products wait for memory and for requests; where it is
        not given, as `sustained`.
    launch: seconds that a kernel costs beside its work.
    family: the generation, by which attention kernels are chosen and rated (`attention_rates`).
    """

    name: str
    flops: dict[str, float]
    memory: float
    memory_bandwidth: float
    units: int
    source: str
    sustained: dict[str, float] = field(default_factory=dict)
    inference: dict[str, float] = field(default_factory=dict)
    launch: float = 2e-6
    family: str = "hopper"

    @functools.cached_property
    def serving(self) -> Chip:
        """The chip as prefill and decode find it."""
        return dataclasses.replace(self, sustained=self.sustained | self.inference)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "a100",
            {"bf16": 312e12},
            80e9,
            2.039e12,
            108,
            "NVIDIA A100 80GB SXM data sheet",
            {"bf16": 0.87},
            family="ampere",
        ),
        Chip(
            "h100",
            {"bf16": 989.4e12, "fp8": 1978.9e12},
            80e9,
            3.35e12,
            132,
            "NVIDIA H100 SXM data sheet",
            # Fitted to dgx_cloud. In inference: the best rows of gemm_h100_sxm_bf16 exceed 900 TFLOP/s, and
            # random data reaches about 790 on the same chip (its README).
            {"bf16": 0.68, "fp8": 0.58},
            {"bf16": 0.88},
        ),
        Chip(
            "h200",
            {"bf16": 989.4e12, "fp8": 1978.9e12},
            141e9,
            4.8e12,
            132,
            "NVIDIA H200 SXM data sheet",
            {"bf16": 0.68, "fp8": 0.58},  # as H100
            {"bf16": 0.88},
        ),
        Chip(
            "h100-pcie",
            {"bf16": 756e12, "fp8": 1513e12},
            80e9,
            2.0e12,
            114,
            "NVIDIA H100 PCIe data sheet",
            {"bf16": 0.75, "fp8": 0.70},  # 350 W instead of 700 W: an assumption, measured nowhere
        ),
        Chip(
            "gb200",
            {"bf16": 2.5e15, "fp8": 5.0e15},
            186e9,
            8.0e12,
            148,
            "NVIDIA GB200 NVL72 data sheet, per GPU",
            {"bf16": 0.53, "fp8": 0.51},  # as B200
            family="blackwell",
        ),
        Chip(
            "b200",
            {"bf16": 2.25e15, "fp8": 4.5e15},
            180e9,
            7.7e12,
            148,
            "NVIDIA DGX B200 data sheet, per GPU",
            # Fitted to simumax_b200 (bf16) and to the dense fp8 rows of megatron_bridge, B200 and GB200.
            {"bf16": 0.53, "fp8": 0.51},
            family="blackwell",
        ),
        Chip(
            "cpu",
            {"bf16": 30e9, "fp32": 30e9},
            8e9,
            10e9,
            1,
            "one CPU core with torch over gloo: the order of magnitude of what was seen on small machines",
            {"bf16": 1.0, "fp32": 1.0},
            launch=20e-6,
            family="cpu",
        ),
    )
}

# ------------------------------------------------------------------------------ links

# (name, byte/s of one GPU in one direction)
NVLINK3 = ("NVLink 3", 300e9)  # A100 SXM data sheet: 600 GB/s in both
NVLINK4 = ("NVLink 4", 450e9)  # H100 SXM data sheet: 900 GB/s in both
NVLINK5 = ("NVLink 5", 900e9)  # GB200 NVL72 data sheet: 1.8 TB/s in both
PCIE4 = ("PCIe 4 x16", 32e9)  # PCI-SIG: 16 GT/s, 16 lanes
PCIE5 = ("PCIe 5 x16", 64e9)  # PCI-SIG: 32 GT/s, 16 lanes
NDR = ("NDR InfiniBand", 50e9)  # 400 Gbit/s, an adapter for each GPU
NDR_HALF = ("NDR InfiniBand", 25e9)  # an adapter for two GPUs
HDR = ("HDR InfiniBand", 25e9)  # 200 Gbit/s, an adapter for each GPU
HDR_HALF = ("HDR InfiniBand", 12.5e9)  # an adapter for two GPUs

# --------------------------------------------------------------------------- rooflines


@dataclass(frozen=True)
class Machine:
    """The constants of a roofline, in FLOP/s, byte/s and seconds.

    `fused_head_dim` is the widest head of the fused attention kernels: wider heads write their scores to
    memory, as an unfused softmax does.
    """

    name: str
    flops: float
    bandwidth: float
    latency: float
    memory_bandwidth: float
    fused_head_dim: int


# Widest head of the fused kernels that train (FlashAttention 2 and 3, cuDNN 9): wider heads write scores.
FUSED_HEAD_DIM = 256
SCORE_PASSES = 6  # an unfused softmax writes or reads each score about this often, forward
# H100 SXM: fused causal attention reaches about 400 TFLOP/s in bf16 (FlashAttention-3, arXiv 2407.08608,
# fig. 5: head_dim 128, forward, sequence 2k); NCCL sustains about 350 GB/s of NVLink 4.
GPU = Machine("gpu", 400e12, 350e9, 10e-6, CHIPS["h100"].memory_bandwidth, FUSED_HEAD_DIM)
# One CPU core with torch's attention over gloo on loopback: orders of magnitude only.
LOOPBACK = ("loopback", 1e9)
CPU = Machine(
    "cpu", CHIPS["cpu"].flops["fp32"], LOOPBACK[1], 100e-6, CHIPS["cpu"].memory_bandwidth, 1 << 30
)
MACHINES = {"cuda": GPU, "cpu": CPU}

# ------------------------------------------------------------------- matrix products

# A fit of gemm_h100_sxm_bf16 (m, n, k from 512 to 16384: mean absolute error 12 %; its rows are an upper
# envelope): tiles of one thread block per multiprocessor, in whole waves, each with a start-up that does not
# depend on k. (rows, columns, share of the peak that the tile can reach)
GEMM_TILES = ((128, 256, 0.88), (256, 128, 0.88), (128, 128, 0.75), (64, 256, 0.70), (64, 64, 0.40))
GEMM_TILE_START = 1e-6  # seconds, H100; other chips by their clock, which is nearly the same
GEMM_SPLIT = 512  # inner elements below which a product is not cut along them
# Share of the peak memory bandwidth that streaming kernels reach: STREAM-like kernels on A100 and H100 reach
# 0.85 to 0.92 (A100: 1.72 of 2.04 TB/s in NVIDIA's nvbandwidth); 0.8 fits gemm_h100_sxm_bf16's thin rows.
MEMORY_EFFICIENCY = 0.8

# ------------------------------------------------------------------------- attention

# A fused kernel's backward computes 2.5 times the FLOPs: five products instead of two, scores again, and the
# gradients of probabilities, values, keys and queries (arXiv 2307.08691). Rates: `attention_rates`.
ATTENTION_BACKWARD_FLOPS = 2.5
# Share of the peak that chunked scans of linear attention reach: their products are of 64 to 128 rows, and as
# many bytes move beside them (an assumption: no public table was found).
LINEAR_SHARE = 0.2
# FP32 products run without tensor cores: 67 TFLOP/s beside 989 in bf16 (H100 SXM data sheet), 19.5 beside 312
# on A100.
FP32_SHARE = 67 / 989
# An unfused softmax, forward: reads and writes of a score by scale-mask-softmax, and by dropout with its mask.
SOFTMAX_PASSES, DROPOUT_PASSES, BACKWARD_PASSES = 2.0, 2.5, 3.0
# Decode reads the cache, attention_decode_h100_sxm: share of the memory bandwidth that its largest rows reach
# (3.17 of 3.35 TB/s), and a start-up between that of its smallest (10 us) and its largest rows (16 us).
DECODE_CACHE_EFFICIENCY = 0.94
DECODE_ATTENTION_START = 13e-6

# ----------------------------------------------------------------------- collectives

# nccl_h100_sxm: microseconds, two digits, at these message sizes as nccl-tests counts them (all-gather: the
# whole output; reduce-scatter and all-to-all: the whole input), in one NVLink domain of 2, 4, 8 GPUs.
COLLECTIVE_SIZES = (4 * KIB, 64 * KIB, 1 * MIB, 4 * MIB, 32 * MIB, 512 * MIB)
COLLECTIVE_MICROSECONDS = {
    "all-gather": {
        2: (5.3, 6.4, 11, 27, 93, 1040),
        4: (7.4, 9.0, 14, 37, 110, 1270),
        8: (11, 13, 17, 33, 125, 1400),
    },
    "reduce-scatter": {
        2: (5.3, 6.3, 11, 24, 96, 1080),
        4: (7.3, 8.2, 12, 33, 106, 1300),
        8: (11, 12, 15, 30, 111, 1400),
    },
    "all-reduce": {
        2: (6.5, 7.3, 15, 33, 144, 1690),
        4: (9.8, 11, 18, 42, 176, 2300),
        8: (16, 19, 25, 50, 200, 2110),
    },
    "all-to-all": {
        2: (6.6, 12, 15, 21, 81, 960),
        4: (7.6, 9.6, 16, 25, 111, 1400),
        8: (7.5, 8.7, 16, 26, 125, 1490),
    },
}
# Up to about this size per rank an all-gather beats an all-to-all of two ranks that moves half as much (the
# table above), and one that moves as much at any number of ranks.
GATHERED_BYTES = 512 * KIB
# What the table was measured on: NVLink 4, 450 GB/s in each direction (H100 SXM data sheet).
TABLE_LINK_BANDWIDTH = 450e9
# Above 8 ranks in one domain nothing was measured: bandwidth stays, latency grows by this factor per doubling
# (4 → 8 ranks in the table: 1.4 to 1.7).
LATENCY_PER_DOUBLING = 1.5
# Between nodes: no public table of two-node H100 collectives was found, so this part is a model, and the
# weakest one here. NDR InfiniBand measures 48 to 49 of 50 GB/s per NIC (NVIDIA/nccl-tests issue 267); many
# rings share switches, so large collectives are taken to keep 46 of it (assumption).
NETWORK_EFFICIENCY = 0.92
# Seconds of one hop of a ring over nodes, and of one message: NCCL's small messages on InfiniBand (assumption).
NETWORK_LATENCY = 10e-6
POINT_TO_POINT_LATENCY = 10e-6

# -------------------------------------------------------------------------- training

# Bytes of one parameter in megatron-core's mixed precision: weight (bf16), gradient (fp32, accumulated over
# micro-batches), and the optimizer's fp32 master weight and two moments. optimizer/distrib_optimizer.py.
WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 4, 12
# Bytes that Adam reads and writes per parameter: gradient 4, three fp32 states read and written 24, weight 2;
# the norm of gradients for clipping reads 4 more.
OPTIMIZER_TRAFFIC = 34
# What the host takes for an operator of a layer: Python, autograd and launches. Golden values of small models
# on a DGX H100 (NVIDIA/Megatron-LM, tests/functional_tests, 12 layers of 512): a layer and micro-batch take
# 3.3 to 4 ms at TP 2 and 4, and have 35 to 40 operators. A matrix product alone takes 11 to 18 us in torch
# (NVIDIA/dgxc-benchmarking, microbenchmarks/cpu_overhead).
HOST_SECONDS = 90e-6
# Host and synchronisation time of an iteration (data, loss, logging), assumption.
ITERATION_OVERHEAD = 20e-3
# Beside which share of the last backward (first forward) data parallel communication can run: buckets are ready
# one after the other, and the last has nothing beside it (assumption).
OVERLAP_ROOM = 0.9
# Memory that CUDA, NCCL and the allocator's fragments take: what is counted, and the range that it may lie in.
# The allocator reserves 2.8 to 6.9 % more than is allocated at the peak (MooreThreads/SimuMax, B200 release
# v1.2: seven layouts of Llama 3 and DeepSeek in Megatron-LM). CUDA's context and NCCL's buffers lie outside of
# it (1 to 3 GB: an assumption; they grow with the number of groups).
FRAMEWORK_BYTES = 4e9
FRAGMENTS, OUTSIDE_BYTES = (0.028, 0.069), (1e9, 3e9)
