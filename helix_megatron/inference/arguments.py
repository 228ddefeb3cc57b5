"""The flags that `helix generate` and `helix serve` share: checkpoint, ranks and precision.

`inference_args` makes of them, and of what the checkpoint says about its model, the namespace that
`helix_megatron.training.model` builds a model from. Starts without torch.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.training.arguments import EXPERTS, MODEL

DTYPES = ("fp32", "bf16", "fp16", "fp64")
# Flags of training's model that mean nothing here, or that another flag of ours is for.
NOT_FOR_INFERENCE = frozenset(
    (
        "--seq-length",
        "--attention-dropout",
        "--hidden-dropout",
        "--init-method-std",
        "--moe-router-load-balancing-type",
        "--moe-aux-loss-coeff",
    )
)
OVERRIDES = tuple(row for row in (*MODEL, *EXPERTS) if row[0] not in NOT_FOR_INFERENCE)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the groups `checkpoint`, `ranks` and `model` to a parser and return the parser."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument(
        "--load",
        metavar="DIR",
        required=True,
        help="the model: checkpoints of Helix or of Megatron, files per rank, or a Hugging Face model",
    )
    group.add_argument(
        "--ckpt-step", type=int, help="load the checkpoint of this iteration (default: the newest)"
    )
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="directory of a Hugging Face tokenizer, a tokenizer.json, or byte: every byte is a token "
        "(default: what lies with the checkpoint; byte for a vocabulary of 256)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="precision; auto is fp32 on CPU and the checkpoint's on a GPU (default: %(default)s)",
    )
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="read pickles that could run code of whoever wrote them; only for files that are your own",
    )
    group.add_argument(
        "--seed", type=int, default=1234, help="of random numbers (default: %(default)s)"
    )
    _add_ranks(parser)
    _add_overrides(parser)
    return parser


def inference_args(namespace: argparse.Namespace, world_size: int) -> argparse.Namespace:
    """What the flags and the checkpoint make together: validated flags of the training script, for inference.

    One copy of the model lies on all ranks: tensor parallel size `world_size`, no pipeline and no data
    parallelism. Dropout is off. Sequence parallelism is on exactly for a mixture of experts on several ranks,
    where Megatron's layers insist on it.

    Args:
        namespace: of a parser with `add_checkpoint_arguments`.
        world_size: ranks.

    Returns:
        As `training.validate.check_model` and `pad_vocabulary` leave it. In addition `load_path` (the resolved
        directory) and `load_kind`, `dtype` (one of `DTYPES`), `tokenizer`, `trust_checkpoint`, and `notes`:
        sentences that tell people what was chosen for them.

    Raises:
        HelixError: no checkpoint, or flags that do not fit it or the ranks; with what to try.
    """
    from helix_megatron.inference import model_flags as describe
    from helix_megatron.training.model_options import args_from_model_flags

    tensor = _tensor_parallel_size(namespace, world_size)
    checkpoint = describe.open_description(
        namespace.load, namespace.ckpt_step, trust=namespace.trust_checkpoint
    )
    given = {name: getattr(namespace, name) for name in _override_names(namespace)}
    notes: list[str] = []
    flags = describe.with_overrides(checkpoint, given, notes.append)
    flags, segments = describe.cut_heads(
        checkpoint,
        flags,
        tensor,
        namespace.intra_head_parallel_size,
        namespace.helix_attention,
        namespace.helix_query_layout,
        notes.append,
    )
    helix = HelixConfig(
        segments, namespace.helix_attention, query_layout=namespace.helix_query_layout
    )
    expert, expert_tensor = describe.deal_experts(
        flags,
        tensor,
        namespace.expert_model_parallel_size,
        namespace.expert_tensor_parallel_size,
        notes.append,
    )
    describe.check_cuts(checkpoint, flags, tensor, expert, expert_tensor, helix)
    args = args_from_model_flags(
        _without_training(flags),
        world_size=world_size,
        seq_length=describe.sequence_length(flags, tensor),
        micro_batch_size=1,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        intra_head_parallel_size=segments,
        helix_attention=namespace.helix_attention,
        helix_query_layout=namespace.helix_query_layout,
        sequence_parallel=bool(flags.get("num_experts")) and tensor > 1,
        distributed_backend=namespace.distributed_backend,
        distributed_timeout_minutes=namespace.distributed_timeout_minutes,
        seed=namespace.seed,
        load=namespace.load,
        ckpt_step=namespace.ckpt_step,
        trust_checkpoint=namespace.trust_checkpoint,
        transformer_impl=given.get("transformer_impl"),
    )
    args.dtype = describe.precision(checkpoint, namespace.dtype)
    args.bf16, args.fp16 = args.dtype == "bf16", args.dtype == "fp16"
    args.load_path, args.load_kind = str(checkpoint.directory), checkpoint.kind
    args.tokenizer = namespace.tokenizer
    args.notes = tuple(notes)
    return args


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks")
    group.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        help="tensor parallel ranks p = m·n (default: the number of ranks, and no other is possible)",
    )
    group.add_argument(
        "--intra-head-parallel-size",
        type=_segments,
        default="auto",
        metavar="M",
        help="segments m into which every key-value head is cut; auto is 1 where the heads divide by the "
        "ranks, else the smallest that fits (default: %(default)s)",
    )
    helps = {setting.name: setting.metadata for setting in dataclasses.fields(HelixConfig)}
    for flag, name in (
        ("--helix-attention", "attention"),
        ("--helix-query-layout", "query_layout"),
    ):
        group.add_argument(
            flag,
            choices=helps[name]["choices"],
            default=getattr(HelixConfig(), name),
            help=f"{helps[name]['help']} (default: %(default)s)",
        )
    group.add_argument(
        "--expert-model-parallel-size",
        type=int,
        help="ranks among which experts are dealt (default: all of them where the experts divide by them, "
        "else 1)",
    )
    group.add_argument(
        "--expert-tensor-parallel-size",
        type=int,
        help="tensor parallel ranks inside an expert (default: 1 where experts are dealt, else all)",
    )
    group.add_argument(
        "--distributed-backend",
        choices=("auto", "nccl", "gloo"),
        default="auto",
        help="back end; auto is nccl on GPUs and gloo without",
    )
    group.add_argument(
        "--distributed-timeout-minutes",
        type=float,
        default=10.0,
        help="a collective that takes longer ends the program (default: %(default)s)",
    )
    group.add_argument(
        "--nproc-per-node",
        type=int,
        help="start this many ranks on this machine, as torchrun would; leave it out under a launcher",
    )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    """Without defaults, so that what was given can be told from what was not."""
    group = parser.add_argument_group(
        "model",
        "for checkpoints of stock Megatron, which do not say everything about their model; others do",
    )
    for flag, kind, _, explanation in OVERRIDES:
        settings: dict[str, Any] = {"action": "store_true"}
        if isinstance(kind, tuple):
            settings = {"choices": kind}
        elif kind is not None:
            settings = {"type": kind}
        text = explanation.replace("; --seq-length when not given", "").replace("%", "%%")
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **settings)


def _override_names(namespace: argparse.Namespace) -> list[str]:
    names = (flag.removeprefix("--").replace("-", "_") for flag, *_ in OVERRIDES)
    return [name for name in names if name in namespace]


def _segments(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number")
    return int(text)


def _tensor_parallel_size(namespace: argparse.Namespace, world_size: int) -> int:
    tensor = namespace.tensor_model_parallel_size
    if tensor is None:
        return world_size
    if tensor < 1:
        raise HelixError(f"--tensor-model-parallel-size is {tensor}. It must be at least 1.")
    if tensor != world_size:
        raise HelixError(
            f"--tensor-model-parallel-size {tensor} and {world_size} ranks: one copy of the model lies on all "
            f"ranks, there are no data and no pipeline parallel ones. Start {tensor} ranks (--nproc-per-node "
            f"{tensor}, or torchrun's), or leave --tensor-model-parallel-size out."
        )
    return tensor


def _without_training(flags: dict[str, Any]) -> dict[str, Any]:
    """Without what the run that trained the model decided for itself alone."""
    own = {flag.removeprefix("--").replace("-", "_") for flag in NOT_FOR_INFERENCE}
    return {name: value for name, value in flags.items() if name not in own | {"transformer_impl"}}
