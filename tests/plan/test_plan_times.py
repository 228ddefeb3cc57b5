"""Seconds of kernels and collectives: the measured points come back, and physics holds in between."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from helix_megatron.attention_rates import FUSED, attention_rate, check_kernel, kernel_that_runs
from helix_megatron.errors import HelixError, divisors
from helix_megatron.hardware import CHIPS, COLLECTIVE_MICROSECONDS, COLLECTIVE_SIZES
from helix_megatron.plan.clusters import CLUSTERS
from helix_megatron.plan.collective_time import (
    Group,
    collective_seconds,
    point_to_point_seconds,
    sent_bytes,
)
from helix_megatron.plan.roofline import (
    AttentionWork,
    attention_seconds,
    decode_seconds,
    gemm_seconds,
)

DGX, ONE_DOMAIN, PCIE = CLUSTERS["dgx-h100"], CLUSTERS["nvlink-16"], CLUSTERS["h100-pcie"]
H100 = CHIPS["h100"]
KINDS = tuple(COLLECTIVE_MICROSECONDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_measured_points_come_back(kind, ranks):
    """Interpolation must pass through what was measured."""
    for size, micro in zip(COLLECTIVE_SIZES, COLLECTIVE_MICROSECONDS[kind][ranks], strict=True):
        assert collective_seconds(DGX, kind, size, Group(ranks)) == pytest.approx(micro * 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_more_bytes_never_take_less_time(kind):
    """A dip would make the search prefer larger messages."""
    for cluster in (DGX, ONE_DOMAIN, PCIE):
        for ranks in (2, 3, 6, 8, 16):
            times = [collective_seconds(cluster, kind, 2.0**k, Group(ranks)) for k in range(8, 36)]
            assert times == sorted(times)
            assert all(t > 0 for t in times)


def test_slower_links_and_borders_of_domains_cost():
    """PCIe is slower than NVLink; a group of one GPU per node lives on the network."""
    size = 1 << 28
    for kind in KINDS:
        inside = collective_seconds(DGX, kind, size, Group(8))
        assert collective_seconds(PCIE, kind, size, Group(8)) > 3 * inside
        apart = collective_seconds(DGX, kind, size, Group(8, 8))
        assert apart > 4 * inside
    assert Group(8).link(DGX) == "NVLink 4"
    assert Group(16).link(DGX) == "NDR InfiniBand"
    assert Group(16).link(ONE_DOMAIN) == "NVLink 4"


def test_a_large_collective_over_two_nodes_reaches_what_eight_adapters_carry():
    """Flat rings: bus bandwidth of 16 ranks in two nodes is near eight NICs' 390 GB/s, not above."""
    size = 1 << 32
    seconds = collective_seconds(DGX, "all-gather", size, Group(16))
    assert 250e9 < sent_bytes("all-gather", size, 16) / seconds < 390e9


@pytest.mark.parametrize("domain", [1, 4, 6, 8, 12, 72])
@pytest.mark.parametrize("gpus", [24, 48, 144])
def test_a_group_is_as_slow_as_its_slowest_member_group(domain, gpus):
    """Against counting every rank: groups that borders of domains cut unevenly, too."""
    cluster = dataclasses.replace(DGX, domain=domain, gpus=gpus)
    for ranks in divisors(gpus):
        for stride in divisors(gpus // ranks):
            groups: dict[tuple[int, int], Counter[int]] = {}
            for rank in range(gpus):
                group = rank % stride, rank // (ranks * stride)
                groups.setdefault(group, Counter())[rank // domain] += 1
            found = Group(ranks, stride)
            assert found.domains(cluster) == max(len(held) for held in groups.values())
            fewest = min(min(held.values()) for held in groups.values())
            assert found.inside(cluster) == fewest, (ranks, stride)


def test_nothing_is_sent_alone():
    """Groups of one rank, and empty messages, are free."""
    for kind in KINDS:
        assert collective_seconds(DGX, kind, 1e9, Group(1)) == 0
        assert collective_seconds(DGX, kind, 0, Group(8)) == 0
    assert point_to_point_seconds(DGX, 1e9, Group(1)) == 0


# ----------------------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    ("sizes", "microseconds"),
    [
        # gemm_h100_sxm_bf16 of ai-dynamo/aiconfigurator, rounded: large, thin, and small in every direction.
        ((4096, 4096, 4096), 166),
        ((8192, 8192, 8192), 1540),
        ((8192, 1024, 8192), 169),
        ((2048, 12288, 1536), 110),
        ((16384, 12288, 12288), 5760),
    ],
)
def test_matrix_products_are_near_the_measured_ones(sizes, microseconds):
    """The curve's shape, before the sustained share: 12 % on average over 1536 rows."""
    fresh = dataclasses.replace(H100, sustained={"bf16": 1.0})
    assert gemm_seconds(fresh, *sizes, "bf16") == pytest.approx(microseconds * 1e-6, rel=0.2)


def test_no_kernel_beats_its_roofline():
    """Neither the peak nor the memory bandwidth may be exceeded, at any size."""
    for rows in (1, 7, 64, 1000, 8192):
        for columns in (64, 1536, 51200):
            for inner in (64, 4096, 65536):
                seconds = gemm_seconds(H100, rows, columns, inner, "bf16")
                assert 2 * rows * columns * inner / seconds < H100.flops["bf16"]
                moved = 2 * (rows * inner + inner * columns + rows * columns)
                assert moved / seconds < H100.memory_bandwidth


def test_fp8_is_faster_than_bf16_and_less_than_twice():
    """It is limited by power, which is why its sustained share is smaller."""
    sizes = (8192, 8192, 8192)
    ratio = gemm_seconds(H100, *sizes, "bf16") / gemm_seconds(H100, *sizes, "fp8")
    assert 1.05 < ratio < 2


def work(head_dim: int, length: int, **others: object) -> AttentionWork:
    heads = 32.0
    flops = 4 * heads * head_dim * length * length / 2
    return AttentionWork(flops, heads, length, length, head_dim, True, length, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chip", "kernel", "heads", "dims", "length", "forward_ms", "backward_ms"),
    [
        # meta-pytorch/tritonbench pull 1267: FlashAttention 3, batch 4, 48 heads.
        ("h100", "flash-3", 4 * 48, 128, 8192, 4.817, 15.308),
        ("h100", "flash-3", 4 * 48, 128, 2048, 0.368, 1.631),
        # ffpa-attn's table: its own kernel, and torch's scaled_dot_product_attention.
        ("h200", "ffpa", 32, 512, 8192, 6.3, 25.4),
        ("h200", "auto", 32, 512, 8192, 16.8, 131.0),
        # Dao-AILab/flash-attention pull 2280: FlashAttention 4, batch 4, 16 heads.
        ("b200", "flash-4", 4 * 16, 128, 8192, 0.775, 2.274),
        # attention_prefill_h100_sxm of ai-dynamo/aiconfigurator: 32 heads, multi-head, 64 dimensions.
        ("h100", "flash-3", 32, 64, 8192, 0.677, None),
    ],
)
def test_attention_takes_its_published_time(
    chip, kernel, heads, dims, length, forward_ms, backward_ms
):
    """Causal attention, forward and backward, in the milliseconds that others measured."""
    asked = kernel_that_runs(CHIPS[chip], dims, grouped=False, training=True, asked=kernel)
    own = AttentionWork(
        2.0 * heads * dims * length**2, heads, length, length, dims, False, length, kernel=asked
    )
    forward, backward = attention_seconds(CHIPS[chip], own)
    assert forward * 1e3 == pytest.approx(forward_ms, rel=0.15)
    if backward_ms is not None:
        assert backward * 1e3 == pytest.approx(backward_ms, rel=0.15)


@pytest.mark.parametrize(
    ("chip", "dims", "how", "kernel"),
    [
        ("h100", 128, {}, "cudnn"),
        ("h100", 256, {}, "cudnn"),  # Transformer Engine's
        ("h100", 256, {"training": False}, "flash-2"),  # torch's
        ("h100", 128, {"exchange": "all-to-all-sequence"}, "flash-2"),
        ("h200", 512, {"grouped": False}, "efficient"),
        ("h200", 512, {}, "math"),
        ("h200", 512, {"asked": "ffpa"}, "ffpa"),
        ("a100", 128, {}, "flash-2"),
        ("gb200", 128, {}, "cudnn"),
        ("cpu", 512, {}, "cpu"),
        ("cpu", 128, {"asked": "unfused"}, "unfused"),
    ],
)
def test_the_kernel_is_the_one_that_runs(chip, dims, how, kernel):
    """What torch and Transformer Engine choose, by chip, head dimension and grouping; or what is asked for."""
    usual = {"grouped": True, "training": True}
    assert kernel_that_runs(CHIPS[chip], dims, **usual | how) == kernel


def test_a_kernel_that_does_not_take_the_heads_is_refused():
    """With those that do."""
    with pytest.raises(
        HelixError, match=r"--kernel flash-3 takes no heads of 512 dimensions.*ffpa"
    ):
        check_kernel("flash-3", 512)
    check_kernel("ffpa", 512)


def test_rates_are_physical():
    """Every kernel, dimension, length and chip: below the peak, growing with the length."""
    for name, fits in FUSED.items():
        for chip in CHIPS.values():
            if chip.family == "cpu":
                continue
            for dims in (d for d in (32, 64, 80, 128, 192, 256, 320, 512) if d in fits):
                for back in (False, True):
                    own = [
                        attention_rate(
                            name, chip, dims, s, causal=True, grouped=False, backward=back
                        )
                        for s in (128, 1024, 8192, 1 << 20)
                    ]
                    assert own == sorted(own) and own[0] > 1e12 and own[-1] < chip.flops["bf16"]


def test_scores_that_are_written_cost():
    """Kernels that write them, and exchanges that no kernel can do, are slower by a lot."""
    fused = sum(attention_seconds(H100, work(256, 8192)))
    unfused = sum(attention_seconds(H100, work(256, 8192, kernel="unfused")))
    assert unfused > 1.5 * fused
    reduced = work(256, 8192, score_bytes=4.0 * 32 * 8192**2)
    assert sum(attention_seconds(H100, reduced)) > unfused
    in_fp32 = sum(attention_seconds(H100, work(512, 8192, kernel="math")))
    assert in_fp32 > 5 * sum(attention_seconds(H100, work(512, 8192, kernel="ffpa")))


def test_decode_attention_is_near_its_table():
    """attention_decode_h100_sxm: batch 64, 8192 positions, one key-value head of 128: 101 us."""
    assert decode_seconds(H100, 2 * 64 * 8192 * 128 * 2) == pytest.approx(101e-6, rel=0.05)
    assert decode_seconds(H100, 8 * 2 * 64 * 8192 * 128 * 2) == pytest.approx(694e-6, rel=0.05)


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce", "all-to-all"])
def test_two_nodes_are_never_faster_than_one_domain(kind):
    """The network only adds to what the fast links have to carry."""
    for size in (1e4, 1e6, 1e8):
        one, two = (collective_seconds(where, kind, size, Group(16)) for where in (ONE_DOMAIN, DGX))
        assert one <= two
