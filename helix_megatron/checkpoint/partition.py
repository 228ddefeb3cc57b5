"""Which part of each canonical tensor a rank holds, and under which name.

Ranks here are those that hold *different* parts of a model: data parallel copies are left out. They are
numbered as Megatron numbers them, tensor parallel rank fastest, then expert, then pipeline parallel rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from helix_megatron.checkpoint.catalog import CanonicalTensor, Cut
from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import (
    HelixError,
    Setting,
    divisors,
    listed,
    setting_error,
    with_settings,
)
from helix_megatron.model.description import ModelConfig

AXES = {
    Cut.ROWS: 0,
    Cut.VOCABULARY: 0,
    Cut.GATED_ROWS: 0,
    Cut.QKV_ROWS: 0,
    Cut.COLUMNS: 1,
    Cut.PROJ_COLUMNS: 1,
}


# What the layout of a manifest calls the fields of `RankLayout`.
MANIFEST_KEYS = {
    "tp": "tensor",
    "pp": "pipeline",
    "ep": "expert",
    "etp": "expert_tensor",
    "vocabulary_multiple": "vocabulary_multiple",
}


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank."""

    pipeline: int
    tensor: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor.

    Args:
        axis: that is cut; None for the whole tensor.
        index: int64, canonical positions along the axis, in the rank's order; None for the whole tensor.
        padding: rows of zeros that follow, where the vocabulary is not a multiple of the ranks.
    """

    axis: int | None = None
    index: np.ndarray | None = None
    padding: int = 0

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        shape = list(whole)
        if self.axis is not None:
            assert self.index is not None
            shape[self.axis] = len(self.index) + self.padding
        return tuple(shape)


@dataclass(frozen=True)
class RankLayout:
    """A model cut for tensor, pipeline and expert parallel ranks.

    Args:
        flags: model flags.
        tensor: tensor parallel size p = m·n.
        pipeline: stages; each takes the same number of layers.
        expert: ranks among which experts are dealt.
        expert_tensor: tensor parallel size inside an expert; `tensor` when None.
        helix: how attention is cut; m of 1 is stock attention. `segment-local` attention is stock attention of
            its own model flags, so its m does not matter here.
        vocabulary_multiple: each rank's rows of the vocabulary are a multiple of this.

    Raises:
        HelixError: the sizes do not fit the model; the text says which would.
    """

    flags: Mapping[str, Any]
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    helix: HelixConfig = field(default_factory=HelixConfig)
    vocabulary_multiple: int = 1
    model: ModelConfig = field(init=False, repr=False)
    heads: HeadLayout | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.expert_tensor is None:
            object.__setattr__(self, "expert_tensor", self.tensor)
        object.__setattr__(self, "model", ModelConfig.from_flags(self.flags))
        object.__setattr__(self, "heads", self._heads())
        self._check()

    # ------------------------------------------------------------------ ranks

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of a stage that hold different parts."""
        assert self.expert_tensor is not None
        if not self.model.num_experts:
            return self.tensor
        return math.lcm(self.tensor, self.expert_tensor * self.expert)

    @property
    def num_ranks(self) -> int:
        """Ranks that hold different parts, over all stages."""
        return self.pipeline * self.ranks_per_stage

    def place(self, rank: int) -> Place:
        """Coordinates of rank number `rank` in [0, num_ranks)."""
        assert self.expert_tensor is not None
        stage, within = divmod(rank, self.ranks_per_stage)
        return Place(
            pipeline=stage,
            tensor=within % self.tensor,
            expert=within // self.expert_tensor % self.expert,
            expert_tensor=within % self.expert_tensor,
        )

    # ------------------------------------------------------------------ parts

    def holds(self, tensor: CanonicalTensor, place: Place) -> bool:
        """Whether a rank has any of a tensor, be it under another name."""
        return self.local_name(tensor, place) is not None

    def part(self, tensor: CanonicalTensor, place: Place) -> Part:
        if tensor.cut is Cut.REPLICATED:
            return Part()
        assert self.expert_tensor is not None
        inside_expert = tensor.expert is not None
        ranks = self.expert_tensor if inside_expert else self.tensor
        rank = place.expert_tensor if inside_expert else place.tensor
        axis = AXES[tensor.cut]
        size = tensor.shape[axis]
        if tensor.cut is Cut.VOCABULARY:
            rows = self.padded_vocabulary // ranks
            index = np.arange(min(rank * rows, size), min((rank + 1) * rows, size))
            return Part(axis, index, rows - len(index))
        if tensor.cut is Cut.GATED_ROWS:
            rows = size // 2 // ranks
            half = np.arange(rank * rows, (rank + 1) * rows)
            return Part(axis, np.concatenate([half, half + size // 2]))
        if self.heads is not None and tensor.cut is Cut.QKV_ROWS:
            return Part(axis, self.heads.qkv_rows(rank))
        if self.heads is not None and tensor.cut is Cut.PROJ_COLUMNS:
            return Part(axis, self.heads.proj_columns(rank))
        length = size // ranks
        return Part(axis, np.arange(rank * length, (rank + 1) * length))

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embeddings over all tensor parallel ranks, padding included."""
        multiple = self.vocabulary_multiple * self.tensor
        assert self.model.padded_vocab_size is not None
        return -(-self.model.padded_vocab_size // multiple) * multiple

    # ------------------------------------------------------------------ names

    def local_name(self, tensor: CanonicalTensor, place: Place) -> str | None:
        """Key of a tensor in the state dictionary of the rank's `GPTModel`; None where it has none of it.

        The names are those of megatron-core's local layers. Each stage counts its layers from 0, each
        expert parallel rank its experts.
        """
        last = place.pipeline == self.pipeline - 1
        name = tensor.name
        if tensor.layer is None:
            if name == "embedding.word_embeddings.weight" and self._copies_embedding(place):
                return "output_layer.weight"
            here = place.pipeline == 0 if name.startswith("embedding.") else last
            return name if here else None
        stage, layer = divmod(tensor.layer, self.model.num_layers // self.pipeline)
        if stage != place.pipeline:
            return None
        suffix = name.split(".", 3)[3]
        if tensor.expert is not None:
            assert self.model.num_experts is not None
            owner, expert = divmod(tensor.expert, self.model.num_experts // self.expert)
            if owner != place.expert:
                return None
            suffix = suffix.replace(
                f"experts.{tensor.expert}.", f"experts.local_experts.{expert}.", 1
            )
        for canonical, local in LOCAL_NORMS.items():
            if suffix.startswith(canonical):
                suffix = local + suffix.removeprefix(canonical)
        return f"decoder.layers.{layer}.{suffix}"

    def _copies_embedding(self, place: Place) -> bool:
        """Tied embeddings: the last of several stages has a copy as its output layer."""
        tied = not self.model.untie_embeddings_and_output_weights
        return tied and self.pipeline > 1 and place.pipeline == self.pipeline - 1

    def local_extra_states(self, tensors: Sequence[CanonicalTensor], place: Place) -> Iterator[str]:
        """Keys, whose value is None, that megatron-core's linear layers add to a state dictionary."""
        for tensor in tensors:
            name = self.local_name(tensor, place)
            if name is not None and re.search(r"\.linear_\w+\.weight$", name):
                yield name.removesuffix("weight") + "_extra_state"
        if place.pipeline == self.pipeline - 1:
            yield "output_layer._extra_state"  # also of tied embeddings, where it has no weight

    # ------------------------------------------------------------------ checks

    def _heads(self) -> HeadLayout | None:
        """None for stock attention: its parts are contiguous rows and columns."""
        if not self.helix.active or self.helix.attention == "segment-local":
            return None
        return self.model.layout(self.helix, self.tensor)

    def _check(self) -> None:
        model = self.model
        for name in ("tensor", "pipeline", "expert", "expert_tensor", "vocabulary_multiple"):
            if getattr(self, name) < 1:
                raise HelixError(f"{name} parallel size {getattr(self, name)} is less than 1.")
        if model.num_layers % self.pipeline:
            raise HelixError(
                f"{model.num_layers} layers cannot be dealt evenly to {self.pipeline} pipeline stages. Valid: "
                f"{listed(divisors(model.num_layers))}."
            )
        for has, what in (
            (model.linear_attention_freq, "gated delta nets (<linear_attention_freq>)"),
            (model.hybrid_layer_pattern, "layers of several kinds (<hybrid_layer_pattern>)"),
            (model.multi_latent_attention, "latent attention (<multi_latent_attention>)"),
        ):
            if has:
                raise setting_error(
                    f"a model with {what} has no files per rank here. Valid forms: canonical, huggingface."
                )
        heads = model.num_attention_heads
        if self.heads is None and (heads % self.tensor or model.qkv_rows % self.tensor):
            raise HelixError(
                f"{heads} heads cannot be dealt whole to {self.tensor} tensor parallel ranks.",
                valid=divisors(heads),
                remedy=("Or cut heads with ", Setting("intra_head_parallel_size"), "."),
            )
        moe = model.moe_layers
        if not all(moe):
            self._check_ffn("ffn_hidden_size", model.ffn_hidden_size or 0, self.tensor)
        if any(moe):
            assert model.num_experts is not None and self.expert_tensor is not None
            own = model.moe_ffn_hidden_size or 0
            self._check_ffn("moe_ffn_hidden_size", own, self.expert_tensor)
            if model.moe_shared_expert_intermediate_size is not None:
                name = "moe_shared_expert_intermediate_size"
                self._check_ffn(name, model.moe_shared_expert_intermediate_size, self.tensor)
            if model.num_experts % self.expert:
                raise setting_error(
                    f"{model.num_experts} experts cannot be dealt evenly to {self.expert} ranks. Valid "
                    f"<expert_model_parallel_size>: {listed(divisors(model.num_experts))}."
                )
        elif self.expert > 1 or self.expert_tensor != self.tensor:
            raise setting_error(
                "the model has no experts, so expert parallel sizes have no meaning. Leave out "
                "<expert_model_parallel_size> and <expert_tensor_parallel_size>."
            )

    @staticmethod
    def _check_ffn(name: str, size: int, ranks: int) -> None:
        if size % ranks:
            raise HelixError(
                with_settings(
                    f"the MLP's {size} columns (<{name}>) cannot be cut for {ranks} tensor parallel ranks."
                ),
                valid=divisors(size),
            )


# Canonical names of norms are Transformer Engine's; megatron-core's local layers have modules of their own.
LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
