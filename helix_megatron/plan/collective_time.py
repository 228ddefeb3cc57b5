"""Seconds of a collective: measured inside a domain, rings through its adapters between domains.

Sizes are counted as nccl-tests counts them: an all-gather's whole output, the whole input of a reduce-scatter
or an all-to-all, the tensor of an all-reduce.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import NamedTuple

from helix_megatron import hardware as hw
from helix_megatron.core.exchanges import sent_bytes
from helix_megatron.plan.clusters import Cluster

MEASURED_RANKS = tuple(hw.COLLECTIVE_MICROSECONDS["all-gather"])
_SIZES = tuple(math.log(size) for size in hw.COLLECTIVE_SIZES)


class Group(NamedTuple):
    """Ranks of a collective: how many, and how far apart in global rank numbers."""

    ranks: int
    stride: int = 1

    def inside(self, cluster: Cluster) -> int:
        """Its ranks that share a domain: the fewest, where domains cut it unevenly."""
        return _spread(self.ranks, self.stride, cluster.domain, cluster.gpus)[0]

    def domains(self, cluster: Cluster) -> int:
        """Domains that it crosses: the most, of all groups of this kind."""
        return _spread(self.ranks, self.stride, cluster.domain, cluster.gpus)[1]

    def link(self, cluster: Cluster) -> str:
        """Name of the slowest link that the group crosses."""
        return cluster.network_link if self.domains(cluster) > 1 else cluster.domain_link


@functools.lru_cache(maxsize=4096)
def _spread(ranks: int, stride: int, domain: int, gpus: int | None) -> tuple[int, int]:
    """(fewest ranks of a group that share a domain, most domains of a group), over all groups on so many GPUs.

    A collective waits for its slowest group: 16 ranks in domains of 72 stay inside but for the ranks 64 to 79.
    """
    extent = ranks * stride
    if stride % domain == 0 or domain % extent == 0 or (extent % domain, domain % stride) == (0, 0):
        inside = max(1, min(ranks, domain // stride))
        return inside, ranks // inside
    last = math.lcm(extent, domain) if gpus is None else gpus
    fewest, most = ranks, 1
    for start in range(0, last, extent):
        for first in range(start, min(start + stride, last - (ranks - 1) * stride)):
            held = Counter((first + k * stride) // domain for k in range(ranks))
            fewest, most = min(fewest, *held.values()), max(most, len(held))
    return fewest, most


@functools.lru_cache(maxsize=65536)
def collective_seconds(cluster: Cluster, kind: str, size: float, group: Group) -> float:
    """Seconds of one collective of `size` bytes over a group."""
    if group.ranks == 1 or size <= 0:
        return 0.0
    inside, domains = group.inside(cluster), group.domains(cluster)
    if domains == 1:
        return _domain_seconds(kind, size, inside, cluster.domain_bandwidth)
    if kind == "all-reduce":
        halves = ("reduce-scatter", "all-gather")
        return sum(collective_seconds(cluster, half, size, group) for half in halves)
    rate = cluster.network_bandwidth * hw.NETWORK_EFFICIENCY
    if kind == "all-to-all":
        outside = size * (group.ranks - inside) / group.ranks
        within = size * inside / group.ranks
    else:
        # A flat ring through all ranks, as NCCL runs it: what passes a link inside a domain also passes its
        # border, through the adapters of all its members side by side.
        outside = size * (group.ranks - 1) / group.ranks / inside
        within = size * (group.ranks - 1) / group.ranks * inside / max(inside - 1, 1)
    local = _domain_seconds(kind, within, inside, cluster.domain_bandwidth) if inside > 1 else 0.0
    # Chunks are pipelined through both links; the first still has to cross the network.
    return max(outside / rate, local) + hw.NETWORK_LATENCY * _hops(domains)


def point_to_point_seconds(cluster: Cluster, size: float, group: Group) -> float:
    """Seconds of sending to the next rank of a group."""
    if group.ranks == 1:
        return 0.0
    crosses = group.domains(cluster) > 1
    rate = cluster.network_bandwidth if crosses else cluster.domain_bandwidth
    return hw.POINT_TO_POINT_LATENCY + size / (rate * hw.NETWORK_EFFICIENCY)


def _hops(domains: int) -> float:
    """Steps of latency: a ring over a few domains, a tree over many."""
    return min(domains - 1, 2 * math.log2(domains))


def _domain_seconds(kind: str, size: float, ranks: int, bandwidth: float) -> float:
    """Interpolated over sizes in logarithms, over ranks linearly in log2; scaled by the link's bandwidth."""
    table = hw.COLLECTIVE_MICROSECONDS[kind]
    if ranks in table:
        latency, seconds = _curve(kind, size, ranks)
    elif ranks < MEASURED_RANKS[-1]:
        below = max(r for r in MEASURED_RANKS if r < ranks)
        above = min(r for r in MEASURED_RANKS if r > ranks)
        weight = math.log2(ranks / below) / math.log2(above / below)
        pairs = zip(_curve(kind, size, below), _curve(kind, size, above), strict=True)
        latency, seconds = ((1 - weight) * low + weight * high for low, high in pairs)
    else:
        most = MEASURED_RANKS[-1]
        latency, seconds = _curve(kind, size, most)
        grown = latency * hw.LATENCY_PER_DOUBLING ** math.log2(ranks / most)
        wire = sent_bytes(kind, 1.0, ranks) / sent_bytes(kind, 1.0, most)
        latency, seconds = grown, grown + (seconds - latency) * wire
    # Latency is the protocol's; only the rest follows the link.
    return latency + (seconds - latency) * hw.TABLE_LINK_BANDWIDTH / bandwidth


@functools.lru_cache(maxsize=65536)
def _curve(kind: str, size: float, ranks: int) -> tuple[float, float]:
    """(latency, seconds) on the measured machine, for a measured number of ranks."""
    row = hw.COLLECTIVE_MICROSECONDS[kind][ranks]
    if size <= hw.COLLECTIVE_SIZES[0]:
        return row[0] * 1e-6, row[0] * 1e-6
    if size >= hw.COLLECTIVE_SIZES[-1]:
        return row[0] * 1e-6, row[-1] * 1e-6 * size / hw.COLLECTIVE_SIZES[-1]
    x = math.log(size)
    i = next(k for k in range(len(_SIZES) - 1) if x <= _SIZES[k + 1])
    weight = (x - _SIZES[i]) / (_SIZES[i + 1] - _SIZES[i])
    return row[0] * 1e-6, row[i] ** (1 - weight) * row[i + 1] ** weight * 1e-6
