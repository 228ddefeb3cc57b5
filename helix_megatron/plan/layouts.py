"""One way to lay a model out on GPUs."""

from __future__ import annotations

import functools
from typing import NamedTuple

from helix_megatron.config import HelixConfig
from helix_megatron.core.exchanges import COSTS, NO_EXCHANGE, AttentionShape
from helix_megatron.core.layout import HeadLayout
from helix_megatron.plan.collective_time import Group
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.stages import chunk_layers, stage_layers


class Layout(NamedTuple):
    """Degrees of parallelism. Ranks are numbered as Megatron does: TP, CP, DP, PP from the fastest.

    tp = m·n; segments is m. exchange is `none` where m is 1. ep deals experts to ranks of CP × DP × TP, each
    expert cut over etp. vp: chunks of layers that a pipeline stage holds. recompute: none, selective, full.
    cache: where decode keeps keys and values (`inference`). first, last: layers of those pipeline stages, 0
    where they have as many as the others (`stages`).
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    vp: int = 1
    segments: int = 1
    query_layout: str = "segments"
    exchange: str = NO_EXCHANGE.name
    micro_batch: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    cache: str = "heads"
    first: int = 0
    last: int = 0

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def head_groups(self) -> int:
        """n."""
        return self.tp // self.segments

    def stages(self, layers: int) -> tuple[int, ...]:
        """Layers of each pipeline stage."""
        return stage_layers(layers, self.pp, self.first, self.last)

    def chunks(self, layers: int) -> tuple[tuple[int, ...], ...]:
        """Layers of [stage][chunk]."""
        found = chunk_layers(layers, self.pp, self.vp, self.first, self.last)
        assert found is not None, "a layout whose stages cannot be cut into its chunks"
        return found

    @property
    def degrees(self) -> Layout:
        """The layout without what weights and their states do not depend on."""
        if self.first or self.last:
            return Layout(*self[:6], first=self.first, last=self.last)
        return Layout(*self[:6])

    @property
    def ends(self) -> tuple[int, ...]:
        """Stages of which one needs the most memory, and one the most time: the first, the last, and where
        these have other numbers of layers the second."""
        if self.pp > 2 and (self.first or self.last):
            return 0, 1, self.pp - 1
        return (0, self.pp - 1) if self.pp > 1 else (0,)

    def micro_batches(self, global_batch: int) -> int:
        return global_batch // (self.dp * self.micro_batch)

    # ------------------------------------------------------------------ groups

    @property
    def tp_group(self) -> Group:
        return Group(self.tp)

    @property
    def head_group(self) -> Group:
        return Group(self.segments)

    @property
    def cp_group(self) -> Group:
        return Group(self.cp, self.tp)

    @property
    def dp_group(self) -> Group:
        """Ranks that hold the same weights: context and data parallel ones."""
        return Group(self.dp * self.cp, self.tp)

    @property
    def pp_group(self) -> Group:
        return Group(self.pp, self.tp * self.cp * self.dp)

    @property
    def ep_group(self) -> Group:
        return Group(self.ep, self.etp)

    @property
    def expert_dp_group(self) -> Group:
        ranks = self.tp * self.cp * self.dp // (self.etp * self.ep)
        return Group(ranks, self.etp * self.ep)

    # --------------------------------------------------------------- attention

    def helix(self) -> HelixConfig:
        """The configuration that runs it."""
        if self.segments == 1:
            return HelixConfig()
        if self.exchange == NO_EXCHANGE.name:  # decode: the caches decide
            return HelixConfig(self.segments)
        return HelixConfig(self.segments, exchange=self.exchange, query_layout=self.query_layout)

    @property
    def core_axes(self) -> tuple[str, ...]:
        """Axes of what is exchanged inside core attention, which selective recomputation repeats."""
        return ("exchange", "cp") if COSTS[self.exchange].in_core else ("cp",)

    def describe(self) -> str:
        """`TP 16 = m 4 × n 4 · PP 8 · DP 4 · last 15`, as a row of a table names it.

        The last stage has 15 layers there, and the others have more.
        """
        parts = [f"TP {self.tp}"]
        if self.segments > 1:
            parts[0] += f" = m {self.segments} × n {self.head_groups}"
        for name in ("cp", "pp", "vp", "ep", "dp"):
            if getattr(self, name) > 1:
                parts.append(f"{name.upper()} {getattr(self, name)}")
        parts += [
            f"{name} {getattr(self, name)}" for name in ("first", "last") if getattr(self, name)
        ]
        return " · ".join(parts)


@functools.lru_cache(maxsize=65536)
def strip(layout: Layout) -> Layout:
    """The layout without what the steps of a layer do not depend on."""
    return layout._replace(pp=1, dp=1, vp=1, recompute="none", first=0, last=0)


@functools.lru_cache(maxsize=4096)
def head_layout(model: ModelSpec, tp: int, segments: int, query_layout: str) -> HeadLayout:
    """The layout of an attention layer.

    Raises:
        HelixError: the heads do not fit.
    """
    return model.layout(HelixConfig(segments, query_layout=query_layout), tp)


@functools.lru_cache(maxsize=4096)
def _whole_heads(model: ModelSpec, tp: int) -> HeadLayout:
    """A rank without Helix is a model of its own heads."""
    heads, kv_heads = model.num_attention_heads // tp, max(1, model.num_query_groups // tp)
    kv_heads = kv_heads if heads % kv_heads == 0 else 1
    return HeadLayout(heads, kv_heads, model.head_dim, rotary="none")


def attention_shape(
    model: ModelSpec, layout: Layout, sequence: int, element: int, window: int | None = None
) -> AttentionShape:
    """What an attention layer works on."""
    parts = "tp", "segments", "query_layout", "micro_batch"
    cut = Layout(**{part: getattr(layout, part) for part in parts})
    return _attention_shape(model, cut, sequence, element, window)


@functools.lru_cache(maxsize=16384)
def _attention_shape(
    model: ModelSpec, layout: Layout, sequence: int, element: int, window: int | None
) -> AttentionShape:
    if layout.segments == 1:
        heads = _whole_heads(model, layout.tp)
    else:
        heads = head_layout(model, layout.tp, layout.segments, layout.query_layout)
    seen = None if window is None else (window, 0)
    return AttentionShape(heads, layout.micro_batch, sequence, sequence, element, window=seen)
