"""How fast attention kernels are: one table by kernel, chip, head dimension, mask and grouping, in bf16.

Nobody has measured all of it. A row that is derived from others says so in its source, and what has no row is
taken from the nearest one: the next head dimensions by interpolation, full masks from causal ones, and
grouped-query attention as multi-head. Other chips get the rates of a measured one of their kind, in proportion
to their peak, or to their multiprocessors for kernels that do not use the newest tensor core instructions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from helix_megatron.errors import HelixError
from helix_megatron.hardware import CHIPS, Chip

# Kernels that keep scores on the chip, with the head dimensions that they take.
FUSED = {
    "cudnn": range(1, 257),
    "flash-2": range(1, 257),
    "flash-3": range(1, 257),
    "flash-4": range(1, 129),
    "ffpa": range(257, 513),
    "efficient": range(1, 1 << 20),  # torch's memory-efficient attention: multi-head only
}
# Those that write scores: torch's math (in fp32), and Megatron's and Transformer Engine's unfused attention.
WRITING = ("math", "unfused")
KERNELS = ("auto", *FUSED, *WRITING)
# torch on a CPU, whatever the head; not to be asked for.
CPU_KERNEL = "cpu"
# Made for the mma instructions of Ampere: they do not follow the peaks of later chips.
OLDER = ("flash-2", "ffpa", "efficient")

FLASH3 = (
    "FlashAttention-3, arXiv 2407.08608, figures 5 to 7 (H100 SXM5, 16k tokens in all, hidden 2048)"
)
TRITONBENCH = "meta-pytorch/tritonbench pull 1267 (H100, batch 4, 48 heads)"
PREFILL = "attention_prefill_h100_sxm of ai-dynamo/aiconfigurator (batch 1)"
CUDNN = "NVIDIA/cudnn-frontend, benchmark/sdpa_benchmark_training (cuDNN 9.19, H200)"
FFPA = "ffpa-attn's table, H200, 32 heads, 8192 tokens: 6.3 and 25.4 ms; torch 16.8 and 131 ms"
FLASH4 = "Dao-AILab/flash-attention pulls 2280 and 2605 (B200)"
LIKE = "; backward causal: full × flash-3's causal / full at 128"
AS_128 = "; backward: its share of forward at 128"

Points = tuple[tuple[int, float], ...]


class Rate(NamedTuple):
    """A row: TFLOP/s of a kernel on a chip, by the positions that a query can see.

    grouped: True or False where the two were measured apart. backward: counts 2.5 times the FLOPs of forward.
    """

    kernel: str
    chip: str
    dims: int
    mask: str
    grouped: bool | None
    forward: Points
    backward: Points
    source: str


def _row(
    kernel: str,
    chip: str,
    dims: int,
    mask: str,
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    source: str,
    lengths: tuple[int, ...] = (2048, 8192),
    grouped: bool | None = None,
) -> Rate:
    """A row whose figures belong to these lengths; one figure belongs to the longest."""

    def points(rates: tuple[float, ...]) -> Points:
        return tuple(zip(lengths[-len(rates) :], rates, strict=True))

    return Rate(kernel, chip, dims, mask, grouped, points(forward), points(backward), source)


RATES = (
    _row("flash-3", "h100", 64, "full", (460, 496), (422, 472), FLASH3),
    _row("flash-3", "h100", 64, "causal", (198, 406), (266, 453), PREFILL + LIKE, grouped=False),
    _row("flash-3", "h100", 64, "causal", (318, 484), (266, 453), PREFILL + LIKE, grouped=True),
    _row("flash-3", "h100", 128, "full", (625, 646), (501, 559), FLASH3),
    _row(
        "flash-3",
        "h100",
        128,
        "causal",
        (521, 602),
        (316, 539),
        f"{FLASH3}; backward: {TRITONBENCH}",
    ),
    _row("flash-3", "h100", 256, "full", (707, 746), (566, 643), FLASH3 + AS_128),
    _row("flash-3", "h100", 256, "causal", (537, 628), (326, 562), FLASH3 + AS_128),
    _row("cudnn", "h100", 64, "full", (395, 412), (395, 432), FLASH3),
    _row(
        "cudnn",
        "h100",
        64,
        "causal",
        (310, 363),
        (249, 415),
        f"{FLASH3}: full × its share at 128{LIKE}",
    ),
    _row("cudnn", "h100", 128, "full", (633, 691), (504, 594), CUDNN),
    _row("cudnn", "h100", 128, "causal", (484, 644), (370, 541), CUDNN),
    _row("cudnn", "h100", 192, "causal", (522, 643), (352, 442), CUDNN + "; values of 128"),
    _row("cudnn", "h100", 256, "full", (580, 580), (437, 501), FLASH3 + AS_128),
    _row("cudnn", "h100", 256, "causal", (450, 497), (272, 469), FLASH3 + AS_128),
    _row("flash-2", "h100", 64, "full", (318, 322), (264, 287), FLASH3),
    _row(
        "flash-2",
        "h100",
        64,
        "causal",
        (262, 290),
        (166, 276),
        f"{FLASH3}: full × its share at 128{LIKE}",
    ),
    _row("flash-2", "h100", 128, "full", (362, 370), (291, 318), FLASH3),
    _row("flash-2", "h100", 128, "causal", (298, 333), (184, 306), FLASH3 + LIKE),
    _row("flash-2", "h100", 256, "full", (321, 324), (258, 278), FLASH3 + AS_128),
    _row("flash-2", "h100", 256, "causal", (278, 297), (172, 273), FLASH3 + AS_128),
    _row(
        "ffpa",
        "h200",
        512,
        "causal",
        (290, 349),
        (216,),
        f"{FFPA}; at 2048: the slope of {PREFILL}",
    ),
    _row("efficient", "h200", 512, "causal", (131,), (42,), FFPA, grouped=False),
    _row(
        "flash-2",
        "a100",
        128,
        "causal",
        (156, 228),
        (107, 196),
        "FlashAttention-2, arXiv 2307.08691: 50 to 73 % of the peak forward, up to 63 % backward, taken as the "
        "ends of its lengths; other heads alike",
        lengths=(512, 16384),
    ),
    _row(
        "efficient",
        "a100",
        512,
        "causal",
        (45,),
        (14,),
        "A30's share of its peak, 24 of 165 TFLOP/s (ffpa-attn's README); backward as on H200",
    ),
    _row("ffpa", "a100", 512, "causal", (81,), (50,), "the same: 43 of 165 TFLOP/s on A30"),
    _row(
        "flash-4",
        "b200",
        64,
        "causal",
        (706, 1079),
        (445, 920),
        FLASH4 + "; backward: its share at 128",
    ),
    _row(
        "flash-4",
        "b200",
        128,
        "causal",
        (1132, 1418),
        (714, 1208),
        FLASH4 + "; backward at 2048 as flash-3",
    ),
    _row(
        "flash-4", "b200", 128, "full", (1382, 1535), (1108, 1360), FLASH4 + "; at 2048 as flash-3"
    ),
    _row(
        "cudnn",
        "b200",
        64,
        "causal",
        (826, 1071),
        (520, 912),
        FLASH4 + "; backward as flash-4's share",
    ),
    _row(
        "cudnn",
        "b200",
        128,
        "causal",
        (1132, 1418),
        (714, 1208),
        "as flash-4: at 64 they are alike",
    ),
)


def kernels_for(dims: int) -> list[str]:
    """Those that take heads of so many dimensions."""
    return [name for name, fits in FUSED.items() if dims in fits] + [*WRITING]


def check_kernel(asked: str, dims: int) -> None:
    """Check that the kernel takes the heads of a model.

    Raises:
        HelixError: it does not; names those that do.
    """
    if asked not in ("auto", CPU_KERNEL, *kernels_for(dims)):
        problem = f"--kernel {asked} takes no heads of {dims} dimensions."
        raise HelixError(problem, valid=kernels_for(dims), valid_name=f"kernels for {dims}")


def kernel_that_runs(
    chip: Chip,
    dims: int,
    *,
    grouped: bool,
    training: bool,
    asked: str = "auto",
    exchange: str = "none",
) -> str:
    """The kernel that computes attention over heads of so many dimensions.

    The one that is asked for, where it takes such heads. Else training takes what Transformer Engine takes on
    that chip, inference what torch's attention takes; so do the exchanges that need a call of their own, and
    heads of more than 256 dimensions, which Transformer Engine has no fused kernel for either.
    """
    if asked == CPU_KERNEL or (chip.family == "cpu" and asked != "unfused"):
        return CPU_KERNEL
    if asked in kernels_for(dims):
        return asked
    if exchange == "gather-qk":  # torch's fused kernels need values as wide as keys
        return "math"
    if dims > 256:
        return "math" if grouped else "efficient"
    if exchange == "all-to-all-sequence" or chip.family == "ampere":
        return "flash-2"
    widest = 256 if training and chip.family == "hopper" else 128
    return "cudnn" if dims <= widest else "flash-2"


@functools.lru_cache(maxsize=4096)
def attention_rate(
    kernel: str,
    chip: Chip,
    dims: int,
    positions: float,
    *,
    causal: bool,
    grouped: bool,
    backward: bool,
) -> float:
    """FLOP/s of a fused kernel on a whole chip, where a query sees up to so many positions."""
    rows = _measured(kernel, chip)
    mask = "causal" if causal else "full"
    rows = [row for row in rows if row.mask == mask] or rows
    rows = [row for row in rows if row.grouped in (None, grouped)] or rows
    below = max((row for row in rows if row.dims <= dims), key=lambda row: row.dims, default=None)
    above = min((row for row in rows if row.dims >= dims), key=lambda row: row.dims, default=None)
    ends = [row for row in (below, above) if row is not None]
    rates = [_at(row.backward if backward else row.forward, positions) for row in ends]
    if below is None:  # narrower heads leave a part of the tiles idle
        rate = rates[0] * (dims / ends[0].dims if kernel != "efficient" else 1.0)
    elif above is None or above.dims == below.dims:
        rate = rates[0]
    else:
        weight = (dims - below.dims) / (above.dims - below.dims)
        rate = (1 - weight) * rates[0] + weight * rates[1]
    measured = CHIPS[ends[0].chip]
    if kernel in OLDER and measured.family != chip.family:
        return rate * 1e12 * chip.units / measured.units
    precision = "bf16" if "bf16" in chip.flops else next(iter(chip.flops))
    return rate * 1e12 * chip.flops[precision] / measured.flops["bf16"]


def _measured(kernel: str, chip: Chip) -> list[Rate]:
    """The rows of the kernel on this chip, else on one of its family, else on any."""
    of_kernel = [row for row in RATES if row.kernel == kernel]
    for fits in (
        lambda row: row.chip == chip.name,
        lambda row: CHIPS[row.chip].family == chip.family,
        lambda row: True,
    ):
        found = [row for row in of_kernel if fits(row)]
        if found:
            return found
    raise AssertionError(f"no rates of {kernel}")


def _at(points: Points, positions: float) -> float:
    """peak · s / (s + half) through the first and the last point; the rate of a single one."""
    (first, low), (last, high) = points[0], points[-1]
    if first == last:
        return high
    slope = max(0.0, (1 / low - 1 / high) / (1 / first - 1 / last))
    return 1 / (max(1e-9, 1 / high - slope / last) + slope / positions)
