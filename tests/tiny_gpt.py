"""A tiny GPT of stock megatron-core that trains on the CPU in any layout, with the same weights in all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from helix_megatron.megatron import cpu_runtime
from helix_megatron.megatron.norms import use_available_norms

LAYERS, HIDDEN, HEADS, VOCABULARY, LENGTH = 4, 32, 4, 64, 8
SAMPLES, MICRO_BATCH, STEPS = 8, 2, 3


@dataclass(frozen=True)
class Layout:
    """How one run is cut; `config` goes to TransformerConfig."""

    ranks: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    chunks: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32

    @property
    def virtual_stages(self) -> list[int | None]:
        return list(range(self.chunks)) if self.chunks > 1 else [None]


Chunk = Callable[[Any, int | None], Any]
Log = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def train(layout: Layout) -> Log:
    """A few steps from the canonical weights."""
    start_megatron(layout)
    chunks, optimizer = build(layout)
    return [train_step(layout, chunks, optimizer) for _ in range(STEPS)]


def start_megatron(layout: Layout) -> None:
    """The CPU runtime, megatron-core's groups and random states."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    assert cpu_runtime.install()
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model_parallel_cuda_manual_seed(1234)


def build(
    layout: Layout, chunk: Chunk | None = None, kind: type | None = None
) -> tuple[list[Any], Any]:
    """The model's chunks, wrapped for data parallelism, and the optimizer.

    `chunk` makes a chunk from a configuration of `kind` and a virtual stage: a GPT by default.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    defaults: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    config = (kind or TransformerConfig)(
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        pipeline_dtype=layout.dtype,
        params_dtype=layout.dtype,
        bf16=layout.dtype == torch.bfloat16,
        fp16=layout.dtype == torch.float16,
        **defaults | layout.config,
    )
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap,
        bucket_size=10_000 if layout.overlap else None,
    )
    chunks: list[Any] = []
    for vp_stage in layout.virtual_stages:
        model = (chunk or build_chunk)(config, vp_stage)
        set_canonical_weights(model)
        wrapped = Float16Module(config, model) if layout.half else model
        chunks.append(DistributedDataParallel(config, ddp, wrapped))
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        clip_grad=1.0,
        bf16=layout.dtype == torch.bfloat16,
        fp16=layout.dtype == torch.float16,
        initial_loss_scale=2**10,
        params_dtype=layout.dtype,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=layout.overlap,
        log_num_zeros_in_grad=True,
    )
    optimizer = get_megatron_optimizer(optimizer_config, chunks)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if layout.overlap:
        config.no_sync_func = chunks[0].no_sync
    return chunks, optimizer


def build_chunk(config: Any, vp_stage: int | None) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import transformer_block as block

    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layers = [layer] * block.get_num_layers_to_build(config, vp_stage=vp_stage)
    spec = block.TransformerBlockSubmodules(layer_specs=layers, layer_norm=block.LayerNormImpl)
    return GPTModel(
        config,
        use_available_norms(spec),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        vp_stage=vp_stage,
    )


@torch.no_grad()
def set_canonical_weights(model: Any) -> None:
    """Give every weight values that follow from its name and its place in the whole tensor."""
    from helix_megatron.megatron.fill import own_part, sharded_weights

    def whole(key: str, place: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{key}{place}".encode()))
        values = torch.randn(shape, generator=generator) * 0.05
        return values + 1 if "norm" in key else values

    for item in sharded_weights(model):
        item.data.copy_(own_part(item, whole))


def train_step(layout: Layout, chunks: list[Any], optimizer: Any) -> tuple[float, float]:
    """Forward, backward and update on the one batch: (loss, gradient norm), equal on all ranks."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    replicas = parallel_state.get_data_parallel_world_size()
    tokens = torch.randint(
        VOCABULARY, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(7)
    )
    mine = tokens[parallel_state.get_data_parallel_rank() :: replicas].split(MICRO_BATCH)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(mine) for _ in chunks],
        model=chunks,
        num_microbatches=len(mine),
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    succeeded, norm, _ = optimizer.step()
    assert succeeded
    # Only the last stage has losses; the others add nothing to the sum over all ranks.
    loss = torch.tensor(sum((float(entry["loss"]) for entry in losses), 0.0))
    dist.all_reduce(loss)
    return float(loss) / layout.tp / replicas / len(mine), float(norm)


def forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(LENGTH).expand(len(tokens), -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]

    def loss_function(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = output.float().mean()
        # A clone: the schedule divides `loss` in place by the number of micro-batches.
        return loss, {"loss": loss.detach().clone()}

    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]), loss_function
