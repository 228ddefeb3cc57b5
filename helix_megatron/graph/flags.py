"""Flags of a run as the graph and the checks need them: the training script's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.exchanges import choose
from helix_megatron.exchanges.choice import GPU
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import attention_shape, check_model, pad_vocabulary

BYTES = 256  # the vocabulary of the training script without a tokenizer


def parse(argv: Sequence[str], program: str, world_size: int | None = None) -> argparse.Namespace:
    """Validated flags of the training script, for tracing.

    `--helix-exchange auto` becomes what a GPU would take, and the query layout what it implies.

    Raises:
        HelixError: flags that do not fit together, or that cannot be traced; `--use-checkpoint-args` and no
            checkpoint that can be read.
    """
    args = parse_args(argv, program)
    if args.use_checkpoint_args and not args.load:
        raise HelixError(
            "--use-checkpoint-args without --load: there is nothing to load. Add --load DIR."
        )
    return validated(args, world_size)


def validated(args: argparse.Namespace, world_size: int | None = None) -> argparse.Namespace:
    """Check parsed flags of the training script, and settle what depends on the machine.

    Raises:
        HelixError: as `parse`.
    """
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    check_model(args, ranks if world_size is None else world_size)
    if args.virtual_pipeline_model_parallel_size:
        raise HelixError(
            "interleaved pipeline stages cannot be traced. Leave out --num-layers-per-virtual-pipeline-stage."
        )
    if args.transformer_impl == "transformer_engine":
        raise HelixError(
            "Transformer Engine's kernels need a GPU, and a graph is traced without. Leave out "
            "--transformer-impl transformer_engine."
        )
    args.transformer_impl = "local"
    args.vocab_size = args.vocab_size or BYTES
    pad_vocabulary(args)
    if args.helix.active and args.helix.attention == "exact":
        chosen = choose(attention_shape(args), args.helix.exchange, GPU)
        args.helix = HelixConfig(
            args.intra_head_parallel_size,
            exchange=chosen.name,
            query_layout=args.layout.query_layout,
        )
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a graph says about the run it was traced from."""
    from helix_megatron.training.checkpoint_flags import model_flags

    layout = args.layout
    helix = args.helix
    return {
        "ranks": args.world_size,
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "data": args.data_parallel_size,
        "expert": args.expert_model_parallel_size,
        "expert_tensor": args.expert_tensor_parallel_size,
        "segments": args.intra_head_parallel_size,
        "head_groups": args.tensor_model_parallel_size // args.intra_head_parallel_size,
        "attention": helix.attention if helix.active else "stock",
        "exchange": helix.exchange if helix.active and helix.attention == "exact" else "none",
        "query_layout": layout.query_layout if helix.active else "heads",
        "sequence_parallel": args.sequence_parallel,
        "seq_length": args.seq_length,
        "micro_batch_size": args.micro_batch_size,
        "global_batch_size": args.global_batch_size,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "model": model_flags(args),
    }
