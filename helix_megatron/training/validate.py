"""Everything that can be known to be wrong before any rank starts to compute."""

from __future__ import annotations

import argparse
import math
import os

from helix_megatron.config import HelixConfig
from helix_megatron.data.megatron_datasets import check_data_path
from helix_megatron.data.text import (
    ByteDataset,
    build_tokenizer,
    check_order,
    default_text,
    parse_split,
    read_text,
    split_text,
)
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.exchanges import AttentionShape, choose
from helix_megatron.layout import HeadLayout, rotary_of
from helix_megatron.training.checkpoint_flags import check_flags
from helix_megatron.training.layer_patterns import check_options


def validate(args: argparse.Namespace, world_size: int) -> argparse.Namespace:
    """Check the flags against each other and the files they name, and fill in what follows from them.

    Adds `world_size`, `data_parallel_size`, `num_micro_batches`, `padded_vocab_size`, `helix` and `layout`.

    Raises:
        HelixError: with the values, the valid values and what to try.
    """
    check_model(args, world_size)
    _check_data(args)
    pad_vocabulary(args)
    check_flags(args)
    if args.helix.active and args.helix.attention == "exact":
        choose(attention_shape(args), args.helix.exchange)
    return args


def check_model(args: argparse.Namespace, world_size: int) -> None:
    """The part of `validate` that needs no data and no checkpoint: model, parallelism, batch, precision.

    Adds all that `validate` adds except `padded_vocab_size`; `pad_vocabulary` adds that.

    Raises:
        HelixError: with the values, the valid values and what to try.
    """
    args.world_size = world_size
    _fill_defaults(args)
    _check_ranks(args)
    check_options(args)
    args.helix = HelixConfig.from_args(args)
    args.layout = _layout(args)
    _check_sequence(args)
    _check_batch(args)
    _check_pipeline(args)
    _check_experts(args)
    _check_precision(args)


def attention_shape(args: argparse.Namespace) -> AttentionShape:
    """What an attention layer of the run computes per micro-batch."""
    return AttentionShape(
        layout=args.layout,
        batch=args.micro_batch_size,
        query_length=args.seq_length,
        key_length=args.seq_length,
        element_size=2 if args.bf16 or args.fp16 else 4,
        causal=True,
        window=(args.window_size, 0) if args.window_size is not None else None,
    )


def rotary_percent(args: argparse.Namespace) -> float:
    """Share of a head's dimensions that is rotated; 0 without rotary embedding."""
    return args.rotary_percent if args.position_embedding_type == "rope" else 0.0


def ranks_of_environment(args: argparse.Namespace) -> int:
    """World size that a launcher has set, that --nproc-per-node asks for, or 1."""
    if args.nproc_per_node is not None and "RANK" in os.environ:
        raise HelixError(
            "--nproc-per-node starts ranks, and a launcher has started this one already. Leave it out "
            "under torchrun."
        )
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise HelixError(f"--nproc-per-node {args.nproc_per_node}: at least one rank is needed.")
    return args.nproc_per_node or int(os.environ.get("WORLD_SIZE", "1"))


def _fill_defaults(args: argparse.Namespace) -> None:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups"):
        _at_least_one(args, name)
    for name in ("seq_length", "micro_batch_size", "train_iters", "log_interval"):
        _at_least_one(args, name)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        _at_least_one(args, name)
    _at_least_one(args, "expert_model_parallel_size")
    if not args.group_query_attention:
        args.num_query_groups = args.num_attention_heads
    if args.kv_channels is None:
        if args.hidden_size % args.num_attention_heads:
            raise HelixError(
                f"--hidden-size {args.hidden_size} does not divide into --num-attention-heads "
                f"{args.num_attention_heads}. Valid numbers of heads: "
                f"{listed(divisors(args.hidden_size))}. Or give --kv-channels."
            )
        args.kv_channels = args.hidden_size // args.num_attention_heads
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.max_position_embeddings < args.seq_length:
        raise HelixError(
            f"--seq-length {args.seq_length} is longer than --max-position-embeddings "
            f"{args.max_position_embeddings}. Leave the latter out, or raise it."
        )
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters
    if not 0 <= args.lr_warmup_iters < args.lr_decay_iters:
        raise HelixError(
            f"--lr-warmup-iters {args.lr_warmup_iters} must be at least 0 and less than --lr-decay-iters, "
            f"which is {args.lr_decay_iters} (--train-iters when not given). Lower it."
        )
    if args.seed < 1:
        raise HelixError(f"--seed {args.seed}: Megatron needs a positive whole number. Try 1234.")


def _at_least_one(args: argparse.Namespace, name: str) -> None:
    value = getattr(args, name)
    if value < 1:
        flag = "--" + name.replace("_", "-")
        raise HelixError(f"{flag} is {value}. It must be a whole number of at least 1.")


def _check_ranks(args: argparse.Namespace) -> None:
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.world_size % (tensor * pipeline):
        raise HelixError(
            f"{args.world_size} ranks cannot hold tensor parallel size {tensor} times pipeline parallel size "
            f"{pipeline}: their number must be a multiple of {tensor * pipeline}. Start "
            f"{_next_multiple(args.world_size, tensor * pipeline)} ranks (--nproc-per-node, or torchrun's), "
            "or change --tensor-model-parallel-size."
        )
    args.data_parallel_size = args.world_size // (tensor * pipeline)
    if args.context_parallel_size != 1:
        raise HelixError(
            f"--context-parallel-size {args.context_parallel_size} is not supported by this script. Leave "
            "it at 1; --intra-head-parallel-size uses those ranks for attention."
        )


def _layout(args: argparse.Namespace) -> HeadLayout:
    if args.helix.active:
        percent = rotary_percent(args)
        rotary, rotary_dim = rotary_of(args.kv_channels, percent, args.rotary_interleaved)
        return args.helix.layout(
            num_heads=args.num_attention_heads,
            num_kv_heads=args.num_query_groups,
            head_dim=args.kv_channels,
            tensor_parallel_size=args.tensor_model_parallel_size,
            rotary=rotary,
            rotary_dim=rotary_dim,
            output_gate=args.attention_output_gate,
        )
    heads, tensor = args.num_attention_heads, args.tensor_model_parallel_size
    if heads % tensor:
        raise HelixError(
            f"{heads} heads cannot be dealt to {tensor} tensor parallel ranks. Valid "
            f"--tensor-model-parallel-size without cutting heads: {listed(divisors(heads))}. Or cut them: "
            f"try --intra-head-parallel-size {_smallest_m(args)}."
        )
    groups = args.num_query_groups
    if groups % tensor and tensor % groups:
        raise HelixError(
            f"{groups} key-value heads cannot be dealt to {tensor} tensor parallel ranks, nor copied to an "
            f"equal number of them. Valid --tensor-model-parallel-size for {heads} query heads: "
            f"{listed(t for t in divisors(heads) if groups % t == 0 or t % groups == 0)}."
        )
    return HeadLayout(heads, groups, args.kv_channels, rotary="none")


def _smallest_m(args: argparse.Namespace) -> str:
    """The smallest m that makes the layout legal, for an error's advice."""
    tensor = args.tensor_model_parallel_size
    for m in divisors(tensor)[1:]:
        try:
            HelixConfig(m).layout(
                args.num_attention_heads, args.num_query_groups, args.kv_channels, tensor
            )
        except HelixError:
            continue
        return str(m)
    return "with another tensor parallel size"


def _check_sequence(args: argparse.Namespace) -> None:
    tensor = args.tensor_model_parallel_size
    if args.sequence_parallel and tensor == 1:
        raise HelixError(
            "--sequence-parallel cuts the sequence over the tensor parallel ranks, and there is one. Leave "
            "it out, or raise --tensor-model-parallel-size."
        )
    if args.sequence_parallel and args.seq_length % tensor:
        raise HelixError(
            f"--seq-length {args.seq_length} does not divide by the {tensor} tensor parallel ranks, which "
            f"--sequence-parallel needs. Try {_next_multiple(args.seq_length, tensor)}."
        )


def _check_batch(args: argparse.Namespace) -> None:
    unit = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size is None:
        args.global_batch_size = unit
    if args.global_batch_size < 1 or args.global_batch_size % unit:
        raise HelixError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} times {args.data_parallel_size} data parallel ranks = {unit}. Try "
            f"{_next_multiple(args.global_batch_size, unit)}."
        )
    args.num_micro_batches = args.global_batch_size // unit


def _check_pipeline(args: argparse.Namespace) -> None:
    stages, layers = args.pipeline_model_parallel_size, args.num_layers
    per_virtual = args.num_layers_per_virtual_pipeline_stage
    args.virtual_pipeline_model_parallel_size = None
    if layers % stages:
        raise HelixError(
            f"{layers} layers cannot be dealt to {stages} pipeline stages. Valid "
            f"--pipeline-model-parallel-size: {listed(divisors(layers))}."
        )
    if per_virtual is None:
        return
    if stages == 1:
        raise HelixError(
            "--num-layers-per-virtual-pipeline-stage interleaves pipeline stages, and there is one. Leave "
            "it out, or raise --pipeline-model-parallel-size."
        )
    per_stage = layers // stages
    if per_virtual < 1 or per_stage % per_virtual:
        raise HelixError(
            f"{per_stage} layers of a pipeline stage cannot be cut into virtual stages of {per_virtual}. "
            f"Valid --num-layers-per-virtual-pipeline-stage: {listed(divisors(per_stage))}."
        )
    if args.num_micro_batches % stages:
        raise HelixError(
            f"the interleaved schedule needs the {args.num_micro_batches} micro-batches of an iteration to "
            f"be a multiple of the {stages} pipeline stages. Change --global-batch-size."
        )
    virtual = per_stage // per_virtual
    args.virtual_pipeline_model_parallel_size = virtual if virtual > 1 else None


def _check_experts(args: argparse.Namespace) -> None:
    experts, expert_parallel = args.num_experts, args.expert_model_parallel_size
    if experts is None:
        if expert_parallel > 1:
            raise HelixError(
                f"--expert-model-parallel-size {expert_parallel} deals experts to ranks, and the model has "
                "none. Give --num-experts, or leave it out."
            )
        return
    if experts % expert_parallel:
        raise HelixError(
            f"{experts} experts cannot be dealt to {expert_parallel} ranks. Valid "
            f"--expert-model-parallel-size: {listed(divisors(experts))}."
        )
    if not 1 <= args.moe_router_topk <= experts:
        raise HelixError(
            f"--moe-router-topk {args.moe_router_topk}: a token has 1 to {experts} experts."
        )
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise HelixError(
            "Megatron trains a mixture of experts on several tensor parallel ranks only with "
            "--sequence-parallel. Add it."
        )
    if args.expert_tensor_parallel_size is not None:
        _at_least_one(args, "expert_tensor_parallel_size")
    else:
        # With experts dealt to ranks the common choice is whole experts; else Megatron's own default.
        whole = expert_parallel > 1
        args.expert_tensor_parallel_size = 1 if whole else args.tensor_model_parallel_size
    if args.expert_tensor_parallel_size > 1 and not args.disable_bias_linear:
        whole = math.gcd(experts, args.world_size // args.pipeline_model_parallel_size)
        raise HelixError(
            f"Megatron cannot cut experts with biases for {args.expert_tensor_parallel_size} tensor parallel "
            "ranks. Add --disable-bias-linear"
            + (
                f", or deal whole experts to ranks: --expert-model-parallel-size {whole}."
                if whole > 1
                else "."
            )
        )
    ranks = args.expert_tensor_parallel_size * expert_parallel * args.pipeline_model_parallel_size
    if args.world_size % ranks:
        raise HelixError(
            f"{args.world_size} ranks cannot hold expert tensor parallel size "
            f"{args.expert_tensor_parallel_size} times expert parallel size {expert_parallel} times pipeline "
            f"parallel size {args.pipeline_model_parallel_size} = {ranks}. Lower "
            "--expert-model-parallel-size or --expert-tensor-parallel-size."
        )


def _check_precision(args: argparse.Namespace) -> None:
    if args.bf16 and args.fp16:
        raise HelixError("--bf16 and --fp16 exclude each other. Leave one out.")
    if args.overlap_param_gather and not (
        args.use_distributed_optimizer and args.overlap_grad_reduce
    ):
        raise HelixError(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce. Add them."
        )


def _check_data(args: argparse.Namespace) -> None:
    parse_split(args.split)
    check_order(args.seq_length, args.seed)
    if args.text and args.data_path:
        raise HelixError("--text and --data-path exclude each other. Leave one out.")
    args.tokenizer = None
    args.eval_samples = args.eval_iters * args.global_batch_size if args.eval_interval else 0
    if args.data_path:
        args.tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
        vocabulary = args.tokenizer.vocab_size
        check_data_path(args.data_path, vocabulary, args.seq_length, samples(args), args.split)
    else:
        vocabulary = 256
        byte_datasets(args)
    if args.vocab_size is not None and args.vocab_size < vocabulary:
        raise HelixError(
            f"--vocab-size {args.vocab_size} is smaller than the {vocabulary} tokens of the text. Leave it "
            "out, or raise it."
        )
    args.vocab_size = args.vocab_size or vocabulary


def pad_vocabulary(args: argparse.Namespace) -> None:
    """Set `padded_vocab_size`: the vocabulary, rounded up so that tensor parallel ranks share it evenly."""
    unit = args.make_vocab_size_divisible_by
    if unit < 1:
        raise HelixError(f"--make-vocab-size-divisible-by {unit}: at least 1.")
    if unit % args.tensor_model_parallel_size:
        unit *= args.tensor_model_parallel_size
    args.padded_vocab_size = _next_multiple(args.vocab_size, unit)


def samples(args: argparse.Namespace) -> tuple[int, int, int]:
    """Samples wanted for training, validation and test."""
    return args.train_iters * args.global_batch_size, args.eval_samples, 0


def byte_datasets(args: argparse.Namespace) -> tuple[ByteDataset, ByteDataset | None]:
    """Training and validation text, without end; None where nothing is validated."""
    text = read_text(args.text) if args.text else default_text()
    train, valid, _ = split_text(text, args.split)
    size, seed = args.seq_length, args.seed
    name = "the validation text"
    validation = ByteDataset(valid, size, seed, name=name) if args.eval_samples else None
    return ByteDataset(train, size, seed, name="the training text"), validation


def _next_multiple(number: int, unit: int) -> int:
    return max(1, -(-number // unit)) * unit
