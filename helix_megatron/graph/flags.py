"""Flags of a run as the graph and the checks need them: the training script's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from helix_megatron.config import HelixConfig
from helix_megatron.core.exchanges import choose
from helix_megatron.errors import HelixError, setting_error
from helix_megatron.hardware import GPU
from helix_megatron.run.config import RunConfig
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import BYTES


def parse(argv: Sequence[str], program: str, world_size: int | None = None) -> RunConfig:
    """The run that flags of the training script describe, for tracing.

    `--helix-exchange auto` becomes what a GPU would take, and the query layout what it implies.

    Raises:
        HelixError: flags that do not fit together, or that cannot be traced; `--use-checkpoint-args` and no
            checkpoint that can be read.
    """
    values = parse_args(argv, program)
    if values["transformer_impl"] == "transformer_engine":
        raise HelixError(
            "Transformer Engine's kernels need a GPU, and a graph is traced without. Leave out "
            "--transformer-impl transformer_engine."
        )
    values |= {"transformer_impl": "local", "vocab_size": values["vocab_size"] or BYTES}
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    ranks = math.prod(values[name] for name in names)
    run = RunConfig.from_values(values, ranks if world_size is None else world_size)
    run = run.with_padded_vocabulary()
    if run.data.packed_documents:
        raise HelixError(
            "the borders of packed documents are data, and a graph is traced without. Leave out "
            "--packed-documents."
        )
    if run.model.linear_attention_freq is not None:
        raise setting_error(
            "gated delta nets are not traced: a graph has layers with attention alone. Leave out "
            "<linear_attention_freq>."
        )
    if run.model.attn_logit_softcapping is not None:
        raise setting_error(
            "soft caps of scores are not traced: a graph has attention as one fused kernel, and the one that "
            "computes them is not. Leave out <attn_logit_softcapping>."
        )
    if run.model.hybrid_layer_pattern is not None:
        raise setting_error(
            "layers of several kinds are not traced: a graph has layers of attention and MLP. Leave out "
            "<hybrid_layer_pattern>."
        )
    if run.virtual_stages:
        raise HelixError(
            "interleaved pipeline stages cannot be traced. Leave out --num-layers-per-virtual-pipeline-stage."
        )
    if run.helix.active and run.helix.attention == "exact":
        chosen = choose(run.attention_shape, run.helix.exchange, GPU)
        m, queries = run.helix.intra_head_parallel_size, run.layout.query_layout
        helix = HelixConfig(m, exchange=chosen.name, query_layout=queries)
        run = dataclasses.replace(run, helix=helix)
    return run


def settings_of(run: RunConfig) -> dict[str, Any]:
    """What a graph says about the run it was traced from."""
    helix, parallel, sizes = run.helix, run.parallel, run.sizes
    return {
        "ranks": run.world_size,
        "tensor": sizes["tp"],
        "pipeline": sizes["pp"],
        "context": sizes["cp"],
        "data": sizes["dp"],
        "expert": sizes["ep"],
        "expert_tensor": parallel.expert_tensor_parallel_size,
        "segments": sizes["m"],
        "head_groups": sizes["n"],
        "attention": helix.attention if helix.active else "stock",
        "exchange": helix.exchange if helix.active and helix.attention == "exact" else "none",
        "query_layout": run.layout.query_layout if helix.active else "heads",
        "sequence_parallel": parallel.sequence_parallel,
        "seq_length": run.model.seq_length,
        "micro_batch_size": run.training.micro_batch_size,
        "global_batch_size": run.global_batch_size,
        "precision": run.training.precision,
        "model": run.stored_model.to_flags(),
    }
