"""A training run as one frozen value: the model, how it is dealt to ranks, and how it is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from helix_megatron.arguments import FLAGS
from helix_megatron.config import HelixConfig
from helix_megatron.core.exchanges import AttentionShape
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import counted, divisors, listed, setting_error
from helix_megatron.flags import values_of
from helix_megatron.model.description import ModelConfig
from helix_megatron.run.settings import (
    LOSSES,
    Checkpoints,
    Data,
    Logging,
    Optimization,
    Parallelism,
    Training,
)
from helix_megatron.run.special_layers import check_special_layers


@dataclass(frozen=True)
class RunConfig:
    """All that decides a run on `world_size` ranks: what was left out is filled in, and everything fits.

    Raises:
        HelixError: with the values, the valid values and what to try.
    """

    model: ModelConfig
    world_size: int
    helix: HelixConfig = field(default_factory=HelixConfig)
    parallel: Parallelism = field(default_factory=Parallelism)
    training: Training = field(default_factory=Training)
    optimization: Optimization = field(default_factory=Optimization)
    data: Data = field(default_factory=Data)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    logging: Logging = field(default_factory=Logging)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], world_size: int) -> RunConfig:
        """From the destination names of the training script's flags; what is missing has its default."""
        helix = {
            own: values[name]
            for own, flag in FLAGS.items()
            if (name := flag.removeprefix("--").replace("-", "_")) in values
        }
        groups = {name: kind(**values_of(kind, values)) for name, kind in SETTINGS.items()}
        model = ModelConfig(**values_of(ModelConfig, values))
        return cls(model, world_size, HelixConfig(**helix), **groups)

    def __post_init__(self) -> None:
        self._check_ranks()
        self._check_pipeline()
        self._fill_batches()
        self._fill_experts()
        _ = self.layout  # which heads lie where: wrong numbers are found here
        self._check_sequence()
        check_special_layers(
            self.model,
            self.parallel,
            packed=self.data.packed_documents,
            interleaved=self.virtual_stages is not None,
        )

    def _change(self, group: str, **values: Any) -> None:
        object.__setattr__(self, group, dataclasses.replace(getattr(self, group), **values))

    def with_vocabulary(self, tokens: int) -> RunConfig:
        """The same for data of so many tokens.

        Raises:
            HelixError: the model was told to have fewer.
        """
        size = self.model.vocab_size
        if size is not None and size < tokens:
            raise setting_error(
                f"<vocab_size> {size} is smaller than the {tokens} tokens of the text. Leave it out, or "
                "raise it."
            )
        model = dataclasses.replace(self.model, vocab_size=size or tokens)
        return dataclasses.replace(self, model=model).with_padded_vocabulary()

    def with_padded_vocabulary(self) -> RunConfig:
        """The same with the vocabulary padded for the tensor parallel ranks."""
        return dataclasses.replace(self, model=self.model.padded(self._tensor))

    # ------------------------------------------------------------------------ what follows

    @property
    def _tensor(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def _pipeline(self) -> int:
        return self.parallel.pipeline_model_parallel_size

    @property
    def _context(self) -> int:
        return self.parallel.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model, each of which trains on samples of its own."""
        return self.world_size // (self._tensor * self._pipeline * self._context)

    @property
    def global_batch_size(self) -> int:
        """Samples of an iteration."""
        assert self.training.global_batch_size is not None
        return self.training.global_batch_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of an iteration on one data parallel rank."""
        return self.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens of the samples of an iteration."""
        return self.global_batch_size * self.model.seq_length

    @property
    def rows(self) -> int:
        """Rows of a micro-batch: its samples, or the one into which their documents are packed."""
        return 1 if self.data.packed_documents else self.training.micro_batch_size

    @property
    def row_length(self) -> int:
        """Positions of a row of a micro-batch on all context-parallel ranks together, without padding."""
        return self.model.seq_length * self.training.micro_batch_size // self.rows

    @property
    def virtual_stages(self) -> int | None:
        """Virtual pipeline stages of a rank, where there is more than one."""
        per_virtual = self.parallel.num_layers_per_virtual_pipeline_stage
        if per_virtual is None:
            return None
        stages = self.model.num_layers // self._pipeline // per_virtual
        return stages if stages > 1 else None

    @property
    def samples(self) -> tuple[int, int, int]:
        """Samples wanted for training, validation and test."""
        validation = self.logging.eval_iters if self.logging.eval_interval else 0
        batch = self.global_batch_size
        return self.training.train_iters * batch, validation * batch, 0

    @cached_property
    def layout(self) -> HeadLayout:
        """How the heads lie on the tensor parallel ranks; one group of all heads without Helix."""
        if self.helix.active:
            return self.model.layout(self.helix, self._tensor)
        model, tensor = self.model, self._tensor
        heads, groups = model.num_attention_heads, model.num_query_groups
        if heads % tensor:
            cut = [m for m in model.segments_that_fit(tensor) if m > 1]
            smallest = cut[0] if cut else "with another tensor parallel size"
            raise setting_error(
                f"{heads} heads cannot be dealt to {tensor} tensor parallel ranks. Valid "
                f"<tensor_model_parallel_size> without cutting heads: {listed(divisors(heads))}. Or cut them: "
                f"try <intra_head_parallel_size> {smallest}."
            )
        if groups % tensor and tensor % groups:
            raise setting_error(
                f"{counted(groups, 'key-value head')} cannot be dealt to {tensor} tensor parallel ranks, nor "
                "copied to an equal number of them. Valid <tensor_model_parallel_size> for "
                f"{heads} query heads: "
                f"{listed(t for t in divisors(heads) if groups % t == 0 or t % groups == 0)}."
            )
        return HeadLayout(heads, groups, model.head_dim, rotary="none")

    @property
    def attention_shape(self) -> AttentionShape:
        """What the exchange of an attention layer works on per micro-batch: a context-parallel rank's part."""
        window = self.model.window_size
        return AttentionShape(
            layout=self.layout,
            batch=self.rows,
            query_length=self.row_length // self._context,
            key_length=self.row_length // self._context,
            element_size=4 if self.training.precision == "fp32" else 2,
            causal=True,
            window=(window, 0) if window is not None else None,
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the layout by their short names, as manifests and reports have them."""
        m = self.helix.intra_head_parallel_size
        return {
            "tp": self._tensor,
            "pp": self._pipeline,
            "cp": self._context,
            "dp": self.data_parallel_size,
            "ep": self.parallel.expert_model_parallel_size,
            "m": m,
            "n": self._tensor // m,
        }

    @property
    def local_segments(self) -> int:
        """m of segment-local attention; 1 for any other."""
        local = self.helix.active and self.helix.attention == "segment-local"
        return self.helix.intra_head_parallel_size if local else 1

    @property
    def stored_model(self) -> ModelConfig:
        """The model whose tensors the run's checkpoints hold."""
        segments = self.local_segments
        return self.model if segments == 1 else self.model.cut_heads(segments)

    @property
    def decides_losses(self) -> dict[str, Any]:
        """What decides the losses: runs that agree in these train the same model in the same way."""
        training = self.training
        present = {None, self.optimization.optimizer, training.precision} | self.model.traits
        values = self.model.decides_losses | {"precision": training.precision}
        for settings in (training, self.optimization, self.data):
            for f in dataclasses.fields(settings):
                if f.metadata.get("decides") == LOSSES and f.metadata.get("under") in present:
                    values[f.name] = getattr(settings, f.name)
        if values.get("loss_scale") is not None:
            del values["initial_loss_scale"]
        if self.local_segments > 1:
            values["segments"] = self.local_segments
        if self.checkpoints.finetune:
            values["finetuned_from"] = self.checkpoints.load_path
        return values

    # ------------------------------------------------------------------------ checks

    def _check_ranks(self) -> None:
        unit = self._tensor * self._pipeline * self._context
        if self.world_size % unit:
            context = f" times context parallel size {self._context}" * (self._context > 1)
            raise setting_error(
                f"{counted(self.world_size, 'rank')} cannot hold tensor parallel size {self._tensor} times "
                f"pipeline parallel size {self._pipeline}{context}: their number must be a multiple of {unit}. "
                f"Start {_multiple(self.world_size, unit)} ranks (<nproc_per_node>, or torchrun's), or change "
                "<tensor_model_parallel_size>."
            )

    def _check_sequence(self) -> None:
        length, ranks, parts = self.model.seq_length, self._context, self.parallel.sequence_parts
        if self.data.packed_documents and ranks > 1:  # which are padded to fit
            if self._pipeline > 1:
                raise setting_error(
                    f"<packed_documents> with <context_parallel_size> {ranks} makes rows of different lengths, "
                    f"and {self._pipeline} pipeline stages exchange rows of one. Leave out one of the three."
                )
            return
        chunks = 2 * ranks if ranks > 1 else 1
        if length % chunks:
            raise setting_error(
                f"<seq_length> {length} cannot be cut into 2 chunks for each of {ranks} context parallel "
                f"ranks. Try {_multiple(length, chunks)}, or another <context_parallel_size>."
            )
        if length // ranks % parts:
            of_each = f" of each of {ranks} context parallel ranks" * (ranks > 1)
            raise setting_error(
                f"<seq_length> {length} does not divide by the {parts} tensor parallel ranks{of_each}, which "
                f"<sequence_parallel> needs. Try {_multiple(length, math.lcm(chunks, ranks * parts))}."
            )

    def _fill_batches(self) -> None:
        training, stages = self.training, self._pipeline
        unit = training.micro_batch_size * self.data_parallel_size
        batch = training.global_batch_size
        if batch is None:
            self._change("training", global_batch_size=unit)
        elif batch % unit:
            raise setting_error(
                f"<global_batch_size> {batch} is not a multiple of <micro_batch_size> "
                f"{training.micro_batch_size} times {counted(self.data_parallel_size, 'data parallel rank')} "
                f"= {unit}. Try {_multiple(batch, unit)}."
            )
        if self.optimization.lr_decay_iters is None:
            self._change("optimization", lr_decay_iters=training.train_iters)
        interleaved = self.parallel.num_layers_per_virtual_pipeline_stage is not None
        if interleaved and self.num_micro_batches % stages:
            raise setting_error(
                f"the interleaved schedule needs the {self.num_micro_batches} micro-batches of an iteration to "
                f"be a multiple of the {stages} pipeline stages. Change <global_batch_size>."
            )

    def _check_pipeline(self) -> None:
        stages, layers = self._pipeline, self.model.num_layers
        per_virtual = self.parallel.num_layers_per_virtual_pipeline_stage
        if layers % stages:
            raise setting_error(
                f"{counted(layers, 'layer')} cannot be dealt to {stages} pipeline stages. Valid "
                f"<pipeline_model_parallel_size>: {listed(divisors(layers))}."
            )
        if per_virtual is None:
            return
        if stages == 1:
            raise setting_error(
                "<num_layers_per_virtual_pipeline_stage> interleaves pipeline stages, and there is one. Leave "
                "it out, or raise <pipeline_model_parallel_size>."
            )
        per_stage = layers // stages
        if per_stage % per_virtual:
            raise setting_error(
                f"{per_stage} layers of a pipeline stage cannot be cut into virtual stages of {per_virtual}. "
                f"Valid <num_layers_per_virtual_pipeline_stage>: {listed(divisors(per_stage))}."
            )

    def _fill_experts(self) -> None:
        parallel, experts = self.parallel, self.model.num_experts
        expert, inside = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
        if experts is None:
            if expert > 1:
                raise setting_error(
                    f"<expert_model_parallel_size> {expert} deals experts to ranks, and the model has none. "
                    "Give <num_experts>, or leave it out."
                )
            return
        if experts % expert:
            raise setting_error(
                f"{counted(experts, 'expert')} cannot be dealt to {expert} ranks. Valid "
                f"<expert_model_parallel_size>: {listed(divisors(experts))}."
            )
        if self._tensor > 1 and not parallel.sequence_parallel:
            raise setting_error(
                "Megatron trains a mixture of experts on several tensor parallel ranks only with "
                "<sequence_parallel>. Add it."
            )
        if inside is None:
            # With experts dealt to ranks the common choice is whole experts; else Megatron's own default.
            inside = 1 if expert > 1 else self._tensor
            self._change("parallel", expert_tensor_parallel_size=inside)
        if inside > 1 and not self.model.disable_bias_linear:
            whole = math.gcd(experts, self.world_size // self._pipeline)
            deal = f", or deal whole experts to ranks: <expert_model_parallel_size> {whole}"
            raise setting_error(
                f"Megatron cannot cut experts with biases for {inside} tensor parallel ranks. Add "
                f"<disable_bias_linear>{deal if whole > 1 else ''}."
            )
        ranks = inside * expert * self._pipeline
        if self.world_size % ranks:
            raise setting_error(
                f"{counted(self.world_size, 'rank')} cannot hold expert tensor parallel size {inside} times "
                f"expert parallel size {expert} times pipeline parallel size {self._pipeline} = {ranks}. Lower "
                "<expert_model_parallel_size> or <expert_tensor_parallel_size>."
            )


SETTINGS: dict[str, type] = {
    "parallel": Parallelism,
    "training": Training,
    "optimization": Optimization,
    "data": Data,
    "checkpoints": Checkpoints,
    "logging": Logging,
}


def _multiple(number: int, unit: int) -> int:
    return max(1, -(-number // unit)) * unit
