"""Attention with whole query heads: the library's own code, behind a gather of the key-value heads it needs.

A rank has h/p whole query heads and a segment of its head group's key-value heads. Right behind the projection
the segments become the u whole heads that the rank's queries attend to; from there on the module *is* one with
h/p query and u key-value heads, and everything that it does is the library's: norms, rotary embedding of
whatever kind, windows, sinks, soft caps, gates, the attention implementation that was chosen. What it puts into
a cache is cut into segments again, so that the ranks together hold each head once, and gathered when read.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helix_megatron.core.collectives import gather
from helix_megatron.core.exchanges.gather_kv import attended_heads, gather_kv_heads
from helix_megatron.core.head_norm import head_mean
from helix_megatron.core.layout import HeadLayout
from helix_megatron.core.replicated import to_ranks
from helix_megatron.errors import HelixError
from helix_megatron.huggingface import layers
from helix_megatron.huggingface.attention import dropout_state
from helix_megatron.huggingface.forms import QUERY_NORMS, AttentionForm
from helix_megatron.huggingface.plan import NO_PROBABILITIES
from helix_megatron.huggingface.sharding import Sharding

GATHER = "exchange/gather-kv"


class KeyValueHeads:
    """Which key-value heads this rank's query heads need, and how they come here from the head group."""

    def __init__(self, layout: HeadLayout, sharding: Sharding) -> None:
        self.layout, self.group = layout, sharding.intra_head_group
        self.member = layout.partition(sharding.rank)[1]
        self.wanted = attended_heads(layout, self.member)

    @property
    def copies(self) -> float:
        """On how many ranks each key-value head is, once it is gathered."""
        return len(self.wanted) * self.layout.segments / self.layout.group_kv_heads

    def gathered(self, x_BLGPC: Tensor, *, canonical: bool) -> tuple[Tensor, ...]:
        """P times [B, L, u, d], the wanted heads, whole, from this rank's segments of the group's heads.

        canonical: the segments are those of the layout, as a projection has them; else neighbouring parts.
        """
        return gather_kv_heads(
            x_BLGPC, self.layout, self.group, purpose=GATHER, canonical=canonical
        )

    def all_heads(self, x_BUSD: Tensor) -> Tensor:
        """[B, u, S, d] of wanted heads → [B, g/n, S, d]: all heads of the group."""
        group_heads = list(range(self.layout.group_kv_heads))
        if self.wanted == group_heads:
            return x_BUSD
        x_mBUSD = gather(x_BUSD.contiguous(), self.group, purpose="exchange/cache")
        everyone = [attended_heads(self.layout, m) for m in range(self.layout.segments)]
        holders = [
            next((m, heads.index(head)) for m, heads in enumerate(everyone) if head in heads)
            for head in group_heads
        ]
        return torch.stack([x_mBUSD[m, :, place] for m, place in holders], dim=1)

    def segment(self, x_BUSD: Tensor) -> Tensor:
        """[B, u, S, d] of wanted heads → [B, g/n, S, d/m]: this rank's part of all heads of its group."""
        width = x_BUSD.size(-1) // self.layout.segments
        own = slice(self.member * width, (self.member + 1) * width)
        return self.all_heads(x_BUSD)[..., own].contiguous()


class WholeHeadAttention(layers.Partitioned):
    """The library's attention module, with this rank's query heads and the key-value heads they need."""

    heads: KeyValueHeads

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's own: hidden states [B, L, D] → [B, L, D], replicated; caches hold segments."""
        from transformers import Cache

        if kwargs.get("output_attentions"):
            raise HelixError(NO_PROBABILITIES)

        def local(value: Any) -> Any:
            shared = isinstance(value, Cache) and self.heads.copies > 1
            return SegmentCache(value, self.heads) if shared else value

        kwargs = {name: local(value) for name, value in kwargs.items()}
        args = tuple(map(local, args))
        group, purpose = self.sharding.tensor_group, "tensor/attention"
        if args:
            args = (to_ranks(args[0], group, purpose=purpose), *args[1:])
        else:
            kwargs["hidden_states"] = to_ranks(kwargs["hidden_states"], group, purpose=purpose)
        with self._dropout():
            return super().forward(*args, **kwargs)

    def _dropout(self) -> Any:
        """Ranks drop different attention weights, having different heads."""
        dropped = self.training and getattr(self, "attention_dropout", None)
        if not dropped or getattr(
            self, "residual_dropout", None
        ):  # that one must be equal everywhere
            return nullcontext()
        device = next(self.parameters()).device
        return dropout_state(self.sharding, device, float(dropped))(False)


class LocalConfig:
    """A model's configuration with the numbers of heads that this rank has, for one attention module."""

    def __init__(self, config: Any, **numbers: int) -> None:
        vars(self).update(numbers, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["_config"], name)


class SegmentCache:
    """A cache of the library's as one attention module sees it: given whole heads, it keeps segments."""

    def __init__(self, cache: Any, heads: KeyValueHeads) -> None:
        self._cache, self._heads = cache, heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """key, value [B, u, S, d], new positions → all positions, [B, u, S', d]."""
        parts = (self._heads.segment(key), self._heads.segment(value))
        stored = self._cache.update(*parts, *args, **kwargs)
        if stored[0].size(2) == key.size(2):  # nothing was there before
            return key, value
        k, v = (
            self._heads.gathered(x.transpose(1, 2).unsqueeze(3), canonical=False)[0].transpose(1, 2)
            for x in stored
        )
        return k, v


class GatheredProjection(layers.Partitioned):
    """The projection of keys, or of values: its rows are segments, its output the wanted heads, whole."""

    heads: KeyValueHeads
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] → [.., u·d]."""
        part = F.linear(x, self.weight, self.bias)
        x_BLG1C = part.unflatten(-1, (self.heads.layout.group_kv_heads, 1, -1))
        return self.heads.gathered(x_BLG1C, canonical=True)[0].flatten(-2)


class FusedProjection(GatheredProjection):
    """The projection of queries, keys and values in one: whole query heads, then segments of both others."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] → [.., (h/p + 2u)·d]."""
        layout = self.heads.layout
        part = F.linear(x, self.weight, self.bias)
        own = layout.num_heads // layout.num_ranks * layout.head_dim
        queries, rest = part[..., :own], part[..., own:]
        kv_BLG2C = rest.unflatten(-1, (2, layout.group_kv_heads, -1)).transpose(2, 3)
        kv = self.heads.gathered(kv_BLG2C, canonical=True)
        return torch.cat([queries, *(heads.flatten(-2) for heads in kv)], dim=-1)


class FlatHeadNorm(layers.Partitioned):
    """RMS norm over all heads together (OLMo 2, MiniMax M2), of which this rank has some.

    The weight is whole on every rank, [heads·d]; its gradient is the sum over ranks.
    """

    own: list[int]  # this rank's heads
    copies: float  # on how many ranks each head is
    head_dim: int
    weight: Tensor
    variance_epsilon: float

    @cached_property
    def _columns(self) -> Tensor:
        return (torch.tensor(self.own)[:, None] * self.head_dim + torch.arange(self.head_dim)).view(
            -1
        )

    def forward(self, x: Tensor) -> Tensor:
        """[.., own heads·d] → the same."""
        group = self.sharding.tensor_group
        weight = to_ranks(self.weight, group, purpose="tensor/head-norm")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = head_mean(wide.square(), round(self.copies * weight.numel()), group)
        normed = wide * torch.rsqrt(mean + self.variance_epsilon)
        return (weight[self._columns.to(weight.device)] * normed).to(x.dtype)


def replace_attention(module: Any, form: AttentionForm, sharding: Sharding) -> None:
    """Give an attention module this rank's heads, before its parameters are cut."""
    helix, ranks = sharding.plan.helix, sharding.plan.num_ranks
    layout, values = form.layout(helix, ranks), form.value_layout(helix, ranks)
    heads = KeyValueHeads(layout, sharding)
    for name, part in list(module.named_children()):
        if name in ("k_proj", "v_proj"):
            own = heads if name == "k_proj" else KeyValueHeads(values, sharding)
            layers.replace(part, GatheredProjection, sharding=sharding, heads=own)
        elif name == "qkv_proj":
            layers.replace(part, FusedProjection, sharding=sharding, heads=heads)
        elif name == form.output:
            layers.replace(part, layers.RowParallelLinear, sharding=sharding)
        elif name in form.flat_norms:
            queries = name in QUERY_NORMS
            layers.replace(
                part,
                FlatHeadNorm,
                sharding=sharding,
                head_dim=form.key_dim,
                own=list(layout.query_heads(sharding.rank))
                if queries
                else [layout.kv_heads(sharding.rank)[head] for head in heads.wanted],
                copies=1 if queries else heads.copies,
            )
        elif (
            name not in ("q_proj", "q_b_proj", "kv_b_proj")
            and next(part.parameters(), None) is not None
        ):
            layers.replace(part, layers.UsedByRanks, sharding=sharding)
    own_heads, kv_heads = form.heads // ranks, len(heads.wanted)
    numbers = {"num_attention_heads": own_heads, "num_key_value_heads": kv_heads}
    for name, value in (
        *numbers.items(),
        ("num_heads", own_heads),
        ("num_key_value_groups", own_heads // numbers["num_key_value_heads"]),
    ):
        if hasattr(module, name):
            setattr(module, name, value)
    module.config = LocalConfig(module.config, **numbers)
    layers.replace(module, WholeHeadAttention, sharding=sharding, heads=heads)
