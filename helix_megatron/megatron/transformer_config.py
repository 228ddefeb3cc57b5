"""A transformer configuration that accepts more tensor parallel ranks than heads."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import HeadLayout, rotary_of
from helix_megatron.errors import HelixError
from helix_megatron.megatron.support import CUT, EVERYWHERE, check


@dataclass
class HelixTransformerConfig(TransformerConfig):
    """Megatron's `TransformerConfig`, and how attention is partitioned.

    Raises:
        HelixError: the layout does not fit the heads, or another setting does not work with cut heads.
    """

    helix: HelixConfig = field(default_factory=HelixConfig)
    """Two-level attention partitioning; the default is stock attention."""

    rotary_percent: float = 1.0
    """Share of a head's dimensions that rotary embedding turns, as given to GPTModel; 0 without rotary
    embedding. A segment keeps rotary pairs together, so the layout must know."""

    causal_masks_only: bool = False
    """Dense masks that reach causal attention say causal and nothing else, as those of Megatron's data loader
    do where documents are not reset. Attention then drops them."""

    def __post_init__(self) -> None:
        by_layer = isinstance(self, HeterogeneousTransformerConfig)
        if self.helix.active and self.heterogeneous_block_specs and not by_layer:
            raise HelixError(
                "heterogeneous_block_specs is True, and this configuration has one layout for all layers. Take "
                "HelixHeterogeneousTransformerConfig."
            )
        with relaxed_head_checks(self, self.helix):
            super().__post_init__()


@dataclass
class HelixHeterogeneousTransformerConfig(HeterogeneousTransformerConfig, HelixTransformerConfig):
    """Megatron's `HeterogeneousTransformerConfig`, and how attention is partitioned.

    Layers may differ in their key-value heads and MLPs, or have a linear layer or nothing in the place of
    either. Every layer with attention has the layout of its own key-value heads, with the same m and n.

    Raises:
        HelixError: m and n do not fit the heads of a layer, or another setting does not work with cut heads.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.helix.active:
            for number, block in enumerate(self.per_block_parameters, 1):
                if block.attention.num_query_groups is not None:
                    attention_layout(self.get_config_for_layer(number))

    def get_config_for_layer(self, layer_number: int) -> TransformerConfig:
        """The configuration of a layer, counted from 1; with cut heads a copy of this one, `helix` included."""
        if not self.helix.active:
            return super().get_config_for_layer(layer_number)
        if not 1 <= layer_number <= len(self.per_block_parameters):
            raise ValueError(
                f"layer {layer_number} is none of the layers 1 to {len(self.per_block_parameters)}"
            )
        block, config = self.per_block_parameters[layer_number - 1], copy.copy(self)
        config.num_query_groups = block.attention.num_query_groups or self.num_query_groups
        config.ffn_hidden_size = block.mlp.ffn_hidden_size or self.ffn_hidden_size
        return config


@dataclass
class HelixLatentConfig(MLATransformerConfig, HelixTransformerConfig):
    """Megatron's `MLATransformerConfig`, whose heads cannot be cut.

    Raises:
        HelixError: the partitioning would cut them.
    """


@contextlib.contextmanager
def relaxed_head_checks(config: TransformerConfig, helix: HelixConfig) -> Iterator[None]:
    """Inside the block the configuration counts segments as heads, h·m and g·m, so that Megatron accepts them.

    The tensor parallel size stays m·n, so all of Megatron's other checks are those of an ordinary model.

    Raises:
        HelixError: the layout does not fit the heads, in our words before Megatron says it in its own; or a
            setting cannot work with it.
    """
    if not helix.active:
        yield
        return
    check(config, EVERYWHERE)
    layout = _layout(config, helix)
    if layout.query_layout == "segments":
        check(config, CUT)
    config.kv_channels = layout.head_dim
    heads, groups = config.num_attention_heads, config.num_query_groups
    config.num_attention_heads = layout.num_heads * layout.segments
    config.num_query_groups = layout.num_kv_heads * layout.segments
    try:
        yield
    finally:
        config.num_attention_heads, config.num_query_groups = heads, groups
    config.num_query_groups = layout.num_kv_heads  # what Megatron fills in for None


def attention_layout(config: TransformerConfig) -> HeadLayout:
    """The layout of the self-attention layers of a configuration that has a `helix` field."""
    return _layout(config, config.helix)


def _layout(config: TransformerConfig, helix: HelixConfig) -> HeadLayout:
    heads = config.num_attention_heads
    head_dim = config.kv_channels or config.hidden_size // heads
    percent = getattr(config, "rotary_percent", 1.0)
    rotary, rotary_dim = rotary_of(head_dim, percent, config.rotary_interleaved)
    return helix.layout(
        num_heads=heads,
        num_kv_heads=config.num_query_groups or heads,
        head_dim=head_dim,
        tensor_parallel_size=config.tensor_model_parallel_size,
        rotary=rotary,
        rotary_dim=rotary_dim,
        output_gate=config.attention_output_gate,
    )
