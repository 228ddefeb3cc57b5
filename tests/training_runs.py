"""Short trainings on the pool's ranks, for tests of what a run saves, loads and reports."""

from __future__ import annotations

from typing import Any

from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import validate

BASE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 "
    "--global-batch-size 4 --lr 3e-3 --log-communication-time off --train-iters 2"
)
TP, PP, EP, M = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--expert-model-parallel-size",
    "--intra-head-parallel-size",
)


def train(flags: str, world_size: int) -> list[dict[str, float]]:
    """Train on this rank; what each iteration measured."""
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.pretrain import training

    cpu_runtime.install()
    run = validate(parse_args(flags.split()), world_size)
    return [metrics.record() for metrics in training(run)]


def run(pool, flags: str, world_size: int = 1) -> list[dict[str, float]]:
    """What the first rank measured; all ranks must report the same losses."""
    by_rank = pool.run(train, flags, world_size, world_size=world_size)
    losses = [[record["lm_loss"] for record in records] for records in by_rank]
    assert all(other == losses[0] for other in losses)
    return by_rank[0]


def build(flags: str, world_size: int) -> tuple[Any, Any, Any]:
    """(arguments, configuration, GPTModel) on this rank."""
    from helix_megatron import parallel_state
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.gpt import build_chunk, transformer_config
    from helix_megatron.megatron.initialize import initialize_weights, weights_not_drawn
    from helix_megatron.megatron.random import seed_model_parallel

    cpu_runtime.install()
    run = validate(parse_args(flags.split()), world_size)
    parallel_state.initialize_model_parallel(
        run.parallel.tensor_model_parallel_size,
        intra_head_parallel_size=run.helix.intra_head_parallel_size,
        expert_tensor_parallel_size=run.parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=10,
    )
    seed_model_parallel(run.training.seed)
    config = transformer_config(run)
    with weights_not_drawn(config):
        model = build_chunk(run, config)
    initialize_weights(model, config, run.training.seed)
    return run, config, model
