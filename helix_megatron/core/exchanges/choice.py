"""`auto`: the cheapest exchange that fits a shape, by a roofline of bytes, FLOPs and messages."""

from __future__ import annotations

import functools
from collections.abc import Container
from dataclasses import dataclass

from helix_megatron.core.exchanges.base import AttentionShape, Exchange
from helix_megatron.core.exchanges.registry import EXACT
from helix_megatron.errors import HelixError, Setting
from helix_megatron.hardware import GPU, SCORE_PASSES, Machine
from helix_megatron.tables import text_table


@dataclass(frozen=True)
class Candidate:
    """An exchange and either why it does not fit (`reason`), or what it would cost one rank, one layer."""

    exchange: Exchange
    reason: str
    bytes: int = 0
    flops: int = 0
    seconds: float = float("inf")

    @property
    def fits(self) -> bool:
        return not self.reason


@functools.lru_cache(maxsize=4096)
def candidates(shape: AttentionShape, machine: Machine = GPU) -> tuple[Candidate, ...]:
    """Every exact exchange, those that fit first, cheapest first."""
    found = []
    for exchange in EXACT:
        reason = exchange.supports(shape)
        if reason:
            found.append(Candidate(exchange, reason))
            continue
        sent, flops = exchange.bytes(shape), exchange.flops(shape)
        seconds = _seconds(exchange, shape, machine, sent, flops)
        found.append(Candidate(exchange, "", sent, flops, seconds))
    return tuple(sorted(found, key=lambda candidate: candidate.seconds))


def choose(
    shape: AttentionShape,
    name: str = "auto",
    machine: Machine = GPU,
    allowed: Container[str] | None = None,
) -> Exchange:
    """The exchange called `name`, the cheapest of the family `all-to-all`, or the cheapest at all (`auto`).

    Args:
        allowed: the names to choose among; all when None.

    Raises:
        HelixError: the exchange asked for does not fit; the text says why, and which do.
    """
    ranked = candidates(shape, machine)
    if allowed is not None:
        ranked = tuple(candidate for candidate in ranked if candidate.exchange.name in allowed)
    asked = [c for c in ranked if name in ("auto", c.exchange.name) or _in_family(c, name)]
    if not asked:
        names = [candidate.exchange.name for candidate in ranked]
        raise HelixError(
            f"exchange {name!r} is unknown.", setting="exchange", value=name, valid=["auto", *names]
        )
    if not asked[0].fits:
        reasons = "; ".join(f"{c.exchange.name}: {c.reason}" for c in asked)
        raise HelixError(
            f"exchange {name} does not fit here ({reasons}).",
            setting="exchange",
            value=name,
            valid=[c.exchange.name for c in ranked if c.fits],
            valid_name="here",
            remedy=("Try ", Setting("exchange", "auto"), "."),
        )
    return asked[0].exchange


def explain(shape: AttentionShape, name: str = "auto", machine: Machine = GPU) -> str:
    """A table of all exchanges for a shape, what each costs or why it does not fit, and the choice."""
    layout = shape.layout
    title = (
        f"{layout.num_heads} query heads, {layout.num_kv_heads} key-value heads of {layout.head_dim}, "
        f"{layout.head_groups} head groups of {layout.segments} ranks, query layout {layout.query_layout}; "
        f"batch {shape.batch}, {shape.query_length} queries, {shape.key_length} keys. "
        f"Per rank and layer, forward, estimated for {machine.name}:"
    )
    chosen, rows, unfit = choose(shape, name, machine), [], []
    for c in candidates(shape, machine):
        if c.fits:
            cells = (f"{c.bytes:,}", f"{c.flops / 1e9:.3f}", f"{c.seconds * 1e3:.3f}")
            rows.append((c.exchange.name, *cells, "<- chosen" if c.exchange is chosen else ""))
        else:
            unfit.append(f"  {c.exchange.name:<20} not here: {c.reason}")
    head = ("exchange", "bytes sent", "GFLOP", "est. ms", "")
    return "\n".join([title, text_table(head, rows), *unfit])


def _in_family(candidate: Candidate, name: str) -> bool:
    return name == "all-to-all" and candidate.exchange.name.startswith("all-to-all-")


def _seconds(
    exchange: Exchange, shape: AttentionShape, machine: Machine, sent: int, flops: int
) -> float:
    scores = exchange.score_bytes(shape)
    if not scores and shape.layout.head_dim > machine.fused_head_dim:
        # An unfused kernel computes and writes every score, whatever the mask hides.
        pairs = shape.query_length * shape.key_length
        flops = round(flops * pairs / max(shape.visible_pairs, 1))
        scores = flops * shape.element_size // (4 * shape.layout.head_dim)
    return (
        flops / machine.flops
        + sent / machine.bandwidth
        + exchange.messages(shape) * machine.latency
        + SCORE_PASSES * scores / machine.memory_bandwidth
    )
