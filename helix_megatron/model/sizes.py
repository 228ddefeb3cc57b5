"""What follows from a model's fields: sizes, the kind of every layer, and what makes other fields matter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from helix_megatron.core.layout import RotaryStyle, rotary_of
from helix_megatron.model.fields import ModelFields

MAMBA_KERNEL = 4  # positions that the convolution of a Mamba layer sees: megatron-core has no other


@dataclass(frozen=True)
class ModelSizes(ModelFields):
    """The fields of a model that have been filled in, and what follows from them."""

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        assert self.kv_channels is not None
        return self.kv_channels

    @property
    def rotary(self) -> RotaryStyle:
        """How pairs of dimensions are rotated."""
        return rotary_of(self.head_dim, self.rotated_share, self.rotary_interleaved)[0]

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return rotary_of(self.head_dim, self.rotated_share, self.rotary_interleaved)[1]

    @property
    def rotated_share(self) -> float:
        """Share of a head's dimensions that is rotated; 0 without rotary embedding."""
        return self.rotary_percent if "rope" in self.traits else 0.0

    @property
    def is_gated(self) -> bool:
        """Whether linear_fc1 holds [gate; up]."""
        return self.swiglu or self.geglu or self.quick_geglu

    @property
    def has_qkv_bias(self) -> bool:
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def has_qk_norm_weights(self) -> bool:
        return self.qk_layernorm and not self.qk_l2_norm

    @property
    def qkv_rows(self) -> int:
        """Rows of linear_qkv: g·(r + 2)·d, or g·(2r + 2)·d with an output gate."""
        queries = self.num_attention_heads * (2 if self.attention_output_gate else 1)
        return (queries + 2 * self.num_query_groups) * self.head_dim

    @cached_property
    def moe_layers(self) -> tuple[bool, ...]:
        """Which layers are MoE layers: every n-th, beginning with the first, or those of a list."""
        layers, frequency = range(self.num_layers), self.moe_layer_freq
        if self.hybrid_layer_pattern is not None:
            return tuple(letter == "E" for letter in self.hybrid_layer_pattern)
        if self.num_experts is None:
            return (False,) * self.num_layers
        if isinstance(frequency, int):
            return tuple(layer % frequency == 0 for layer in layers)
        return tuple(map(bool, frequency))

    @cached_property
    def windowed_layers(self) -> tuple[bool, ...]:
        """Which layers see a sliding window: all, all but every n-th, or those of a list."""
        layers, skip = range(self.num_layers), self.window_attn_skip_freq
        if skip is None or self.window_size is None:
            return (self.window_size is not None,) * self.num_layers
        if isinstance(skip, int):
            return tuple((layer + 1) % skip != 0 for layer in layers)
        return tuple(map(bool, skip))

    @cached_property
    def linear_layers(self) -> tuple[bool, ...]:
        """Which layers have a gated delta net instead of attention: all but every n-th, or those of a list."""
        layers, frequency = range(self.num_layers), self.linear_attention_freq
        if frequency is None:
            return (False,) * self.num_layers
        if isinstance(frequency, int):
            return tuple((layer + 1) % frequency != 0 for layer in layers)
        return tuple(map(bool, frequency))

    @property
    def mamba_inner(self) -> int:
        """Dimensions of all heads of a Mamba layer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_maps(self) -> int:
        """Dimensions of all groups' maps into the states of a Mamba layer's heads, and out of them."""
        return self.mamba_num_groups * self.mamba_state_dim

    @property
    def linear_keys(self) -> int:
        """Dimensions of all key heads of a gated delta net, which are those of its queries."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_values(self) -> int:
        """Dimensions of all value heads of a gated delta net."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @cached_property
    def layers_without_rope(self) -> tuple[bool, ...]:
        """Which layers have no rotary embedding though the model has: every n-th, or those of a list."""
        none = self.no_rope_freq
        if none is None:
            return (False,) * self.num_layers
        if isinstance(none, int):
            return tuple((layer + 1) % none == 0 for layer in range(self.num_layers))
        return tuple(map(bool, none))

    @cached_property
    def traits(self) -> frozenset[str]:
        """What the model has, of that which makes fields matter."""
        rope = self.position_embedding_type in ("rope", "yarn")
        experts = self.num_experts is not None
        there = {
            "rope": rope,
            "yarn": self.position_embedding_type == "yarn",
            "rope scaling": rope and self.use_rope_scaling,
            "no biases": self.disable_bias_linear,
            "experts": experts,
            # Balanced by a loss over the tokens of a micro-batch, so that its size matters.
            "balanced micro-batches": experts and self.moe_router_load_balancing_type == "aux_loss",
            "linear attention": self.linear_attention_freq is not None,
            "mamba": "M" in (self.hybrid_layer_pattern or ""),
            "latent attention": self.multi_latent_attention,
            "shared experts": experts and self.moe_shared_expert_intermediate_size is not None,
        }
        return frozenset(trait for trait, has in there.items() if has)
