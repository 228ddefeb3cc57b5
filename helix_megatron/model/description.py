"""One description of a model, from which flags, manifests, Megatron's configuration and sizes come.

*Model flags* are the names of the fields of `ModelConfig` with their values, as a mapping of plain JSON values:
what a checkpoint's manifest holds. They describe the *stock* model whose tensors a checkpoint has; for
`segment-local` attention that is the model with m times the heads.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, divisors, listed, setting_error
from helix_megatron.flags import check_values, names_with
from helix_megatron.model.checks import check_options
from helix_megatron.model.expert_fields import FUNCTION, MIXTURE, TRAINING
from helix_megatron.model.sizes import ModelSizes

SIZES = ("num_layers", "hidden_size", "num_attention_heads")  # that nothing else implies
PATTERNS = ("moe_layer_freq", "window_attn_skip_freq", "no_rope_freq", "linear_attention_freq")
HEADS = ("num_attention_heads", "num_query_groups", "kv_channels")


@dataclass(frozen=True)
class ModelConfig(ModelSizes):
    """A GPT, dense or with a mixture of experts.

    What a field leaves open is filled in when the object is made: widths and heads that others imply, and the
    padded vocabulary, which without padding is the vocabulary.

    Raises:
        HelixError: a value that cannot be, or values that do not go together.
    """

    def __post_init__(self) -> None:
        for name in PATTERNS:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_values(self)
        self._fill()
        check_options(self)

    def _fill(self) -> None:
        heads = self.num_attention_heads
        if not self.group_query_attention:
            self._set("num_query_groups", heads)
        elif heads % self.num_query_groups:
            raise setting_error(
                f"{heads} query heads cannot share {self.num_query_groups} key-value heads. Valid "
                f"<num_query_groups>: {listed(divisors(heads))}."
            )
        if self.kv_channels is None and self.multi_latent_attention:
            self._set("kv_channels", self.v_head_dim)
        if self.kv_channels is None:
            if self.hidden_size % heads:
                raise setting_error(
                    f"<hidden_size> {self.hidden_size} does not divide into <num_attention_heads> {heads}. "
                    f"Valid numbers of heads: {listed(divisors(self.hidden_size))}. Or give <kv_channels>."
                )
            self._set("kv_channels", self.hidden_size // heads)
        if self.ffn_hidden_size is None:
            self._set("ffn_hidden_size", 4 * self.hidden_size)
        if self.num_experts is not None and self.moe_ffn_hidden_size is None:
            self._set("moe_ffn_hidden_size", self.ffn_hidden_size)
        if self.max_position_embeddings is None:
            self._set("max_position_embeddings", self.seq_length)
        if self.padded_vocab_size is None:
            self._set("padded_vocab_size", self.vocab_size)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    # ------------------------------------------------------------------------ model flags

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Self:
        """The model of model flags. What is missing has the default of its flag, except for sizes.

        Without `seq_length` that is its default, or the longest sequence that the model's positions allow.

        Raises:
            HelixError: a size that nothing else implies is missing; a name that is no field; see the class.
        """
        names = [f.name for f in dataclasses.fields(ModelConfig)]
        for name in flags:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise HelixError(f"the training script has no flag {name!r}.{hint}")
        for name in SIZES:
            if flags.get(name) is None:
                raise HelixError(
                    f"the model flags say {name} = {flags.get(name)!r}, and the tensors of a model depend on "
                    "it. It must be a whole number of at least 1."
                )
        given = dict(flags)
        if given.get("seq_length") is None:
            longest = given.get("max_position_embeddings")
            given["seq_length"] = cls.seq_length
            if type(longest) is int and longest > 0:  # others are refused by name
                given["seq_length"] = min(cls.seq_length, longest)
        return cls(**given)

    def to_flags(self) -> dict[str, Any]:
        """Model flags as plain JSON values; `from_flags` is the inverse."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def padded(self, tensor_parallel: int) -> ModelConfig:
        """The same with the vocabulary rounded up so that tensor parallel ranks share it evenly."""
        assert self.vocab_size is not None
        rows = padded_rows(self.vocab_size, self.make_vocab_size_divisible_by, tensor_parallel)
        return dataclasses.replace(self, padded_vocab_size=rows)

    def unpadded(self) -> ModelConfig:
        """The same with as many rows of the vocabulary as there are tokens."""
        return dataclasses.replace(
            self, padded_vocab_size=self.vocab_size or self.padded_vocab_size
        )

    # ------------------------------------------------------------------------ segment-local

    def cut_heads(self, segments: int) -> ModelConfig:
        """The stock model that segment-local attention of so many segments is: m times the heads of 1/m."""
        assert self.kv_channels is not None
        return self._with_heads(
            self.num_attention_heads * segments,
            self.num_query_groups * segments,
            self.kv_channels // segments,
        )

    def joined_heads(self, segments: int) -> ModelConfig:
        """The inverse of `cut_heads`."""
        assert self.kv_channels is not None
        return self._with_heads(
            self.num_attention_heads // segments,
            self.num_query_groups // segments,
            self.kv_channels * segments,
        )

    def _with_heads(self, heads: int, groups: int, channels: int) -> ModelConfig:
        return dataclasses.replace(
            self, num_attention_heads=heads, num_query_groups=groups, kv_channels=channels
        )

    # ------------------------------------------------------------------------ layouts

    def layout(self, helix: HelixConfig, tensor_parallel: int) -> HeadLayout:
        """How the heads lie on tensor parallel ranks.

        Raises:
            HelixError: they do not fit; or attention is latent, and `helix` would cut heads.
        """
        if helix.active and self.multi_latent_attention:
            raise setting_error(
                f"<intra_head_parallel_size> {helix.intra_head_parallel_size} would cut heads, and latent "
                "attention (<multi_latent_attention>) has no key-value heads to cut: it trains with plain "
                "tensor parallelism, and helix generate and helix serve keep its latents once on all ranks. "
                "Leave <intra_head_parallel_size> at 1."
            )
        return helix.layout(
            self.num_attention_heads,
            self.num_query_groups,
            self.head_dim,
            tensor_parallel,
            rotary=self.rotary,
            rotary_dim=self.rotary_dim,
            output_gate=self.attention_output_gate,
        )

    def segments_that_fit(self, ranks: int, query_layout: str = "auto") -> list[int]:
        """Every m with which each rank holds key-value heads, or segments of them, of its own."""
        fitting = []
        for m in divisors(ranks):
            if self.num_query_groups % (ranks // m):
                continue
            if m > 1:
                try:
                    self.layout(HelixConfig(m, query_layout=query_layout), ranks)
                except HelixError:
                    continue
            fitting.append(m)
        return fitting

    # ------------------------------------------------------------------------ meaning

    def _deciding(self, *decided: str) -> dict[str, Any]:
        """The fields that decide something, with their defaults where they have no effect."""
        values = {}
        for f in dataclasses.fields(ModelConfig):
            if f.metadata.get("decides") in decided:
                matters = f.metadata.get("under") in (None, *self.traits)
                values[f.name] = getattr(self, f.name) if matters else f.default
        windowed, moe = self.windowed_layers, self.moe_layers
        values["window_size"] = self.window_size if any(windowed) else None
        values["window_attn_skip_freq"] = list(map(int, windowed)) if len({*windowed}) > 1 else None
        several = len({*moe}) > 1 and self.hybrid_layer_pattern is None
        values["moe_layer_freq"] = list(map(int, moe)) if several else 1
        scaled = self.use_rope_scaling or self.rotary_seq_len_interpolation_factor
        plain = not scaled and "yarn" not in self.traits
        if not any(windowed) or (plain and self.rotary_base_windowed == self.rotary_base):
            values["rotary_base_windowed"] = None
        without = self.layers_without_rope
        values["no_rope_freq"] = (
            list(map(int, without)) if "rope" in self.traits and any(without) else None
        )
        linear = self.linear_layers
        values["linear_attention_freq"] = list(map(int, linear)) if any(linear) else None
        if self.latent_norm_epsilon == self.norm_epsilon:
            values["latent_norm_epsilon"] = None
        pattern = self.hybrid_layer_pattern
        if all(moe) if pattern is None else "-" not in pattern:  # no dense layers have a use for it
            values["ffn_hidden_size"] = None
        return values

    @property
    def function(self) -> dict[str, Any]:
        """What the model computes: equal exactly for models with the same function and shapes of weights."""
        return self._deciding(FUNCTION)

    @property
    def decides_losses(self) -> dict[str, Any]:
        """What of the model decides the losses of its training."""
        values = self._deciding(FUNCTION, TRAINING)
        if self.position_embedding_type != "learned_absolute":
            del values["max_position_embeddings"]
        return values

    @property
    def transformer_settings(self) -> dict[str, Any]:
        """What Megatron's TransformerConfig is told about the model, except for functions and dtypes."""
        settings = self._given_to("megatron")
        if self.window_size is not None:
            settings["window_size"] = (self.window_size, 0)
            settings["window_attn_skip_freq"] = _as_list(self.window_attn_skip_freq)
        if any(self.layers_without_rope):
            settings["no_rope_freq"] = list(map(int, self.layers_without_rope))
        if "linear attention" in self.traits:
            settings["linear_attention_freq"] = list(map(int, self.linear_layers))
        if self.hybrid_layer_pattern is not None:
            settings["is_hybrid_model"] = True
        return settings | {
            "rotary_percent": self.rotated_share,
            "add_bias_linear": not self.disable_bias_linear,
            "gated_linear_unit": self.is_gated,
            "qk_layernorm": self.qk_layernorm or self.qk_l2_norm,
        }

    @property
    def yarn_settings(self) -> dict[str, Any]:
        """What Megatron reads of its configuration with yarn, and what is no field of it."""
        names = names_with(ModelConfig, yarn=True) if "yarn" in self.traits else ()
        return {name: getattr(self, name) for name in names}

    @property
    def own_settings(self) -> dict[str, float | None]:
        """What this package reads of Megatron's configuration; they are no fields of it."""
        names = ("attn_logit_softcapping", "final_logit_softcapping", "latent_norm_epsilon")
        return {name: getattr(self, name) for name in names}

    @property
    def latent_settings(self) -> dict[str, Any]:
        """What Megatron's configuration of latent attention has beside; its layers rotate by themselves."""
        if not self.multi_latent_attention:
            return {}
        names = names_with(ModelConfig, latent=True)
        yarn = {name.removeprefix("yarn_"): value for name, value in self.yarn_settings.items()}
        yarn.pop("correction_range_round_to_int", None)  # as if set
        return {
            **{name: getattr(self, name) for name in names},
            "rope_type": self.position_embedding_type,
            "rotary_base": self.rotary_base,
            "rotary_scaling_factor": 1.0,  # read for the scale of scores without yarn, too
            **yarn,
        }

    @property
    def scales_rope_otherwise(self) -> bool:
        """Whether frequencies are scaled as Llama 3.1's are, but for a constant that GPTModel has."""
        return "rope scaling" in self.traits and self.rope_high_freq_factor != 4.0

    @property
    def gpt_settings(self) -> dict[str, Any]:
        """What Megatron's GPTModel is told about the model."""
        tied = not self.untie_embeddings_and_output_weights
        settings = self._given_to("gpt") | {"share_embeddings_and_output_weights": tied}
        if self.scales_rope_otherwise:
            settings["rope_scaling"] = False
        return settings | (
            {"position_embedding_type": "rope"} if self.multi_latent_attention else {}
        )

    @property
    def hybrid_settings(self) -> dict[str, Any]:
        """What Megatron's HybridModel is told about the model beside its pattern."""
        scaling = ("rope_scaling", "rope_scaling_factor")
        return {name: value for name, value in self.gpt_settings.items() if name not in scaling}

    def _given_to(self, reader: str) -> dict[str, Any]:
        settings = {}
        for f in dataclasses.fields(ModelConfig):
            name = f.metadata.get(reader)
            if name and (f.metadata["group"] != MIXTURE or "experts" in self.traits):
                settings[f.name if name is True else name] = _as_list(getattr(self, f.name))
        return settings


MODEL_FLAGS = names_with(ModelConfig, is_flag=True)
FUNCTION_FLAGS = names_with(ModelConfig, decides=FUNCTION)
# May differ between the run that saved and the run that loads: they change neither tensors nor function.
# Learned positions may not.
FREE_FLAGS = frozenset(f.name for f in dataclasses.fields(ModelConfig)) - set(FUNCTION_FLAGS) | {
    "max_position_embeddings",
    "padded_vocab_size",
}


def complete(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Model flags with all that decide the function, and with what follows from others filled in."""
    model = ModelConfig.from_flags(flags).to_flags()
    return {k: v for k, v in model.items() if k in flags or k in FUNCTION_FLAGS}


def padded_rows(tokens: int, unit: int, tensor_parallel: int) -> int:
    """Rows of a word embedding: a multiple of the unit that tensor parallel ranks share evenly."""
    if unit % tensor_parallel:
        unit *= tensor_parallel
    return -(-tokens // unit) * unit


def _as_list(value: Any) -> Any:
    """Megatron tests patterns of layers for being lists."""
    return list(value) if isinstance(value, tuple) else value
