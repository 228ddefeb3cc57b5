"""Options of the model that Megatron's GPT needs help with, and models from flags alone."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helix_megatron.errors import HelixError
from helix_megatron.training.arguments import build_parser
from helix_megatron.training.validate import check_model, pad_vocabulary


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 and Gemma have it."""
    return F.gelu(x, approximate="tanh")


def activation(args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """Activation of the MLP, of its gate where it is gated."""
    if args.swiglu:
        return F.silu
    return tanh_gelu if args.geglu or args.openai_gelu else F.gelu


def can_fuse_activation(args: argparse.Namespace) -> bool:
    """Whether Megatron's fused kernel for bias and activation computes `activation`.

    Its kernel for GELU computes the tanh approximation whatever it is asked for, so the same flags would mean
    one model on a GPU and another on a CPU.
    """
    return activation(args) is F.silu


def scale_embeddings(model: Any, multiplier: float) -> None:
    """Multiply a GPTModel's word embeddings by `multiplier`, rounded to their dtype, in every forward pass.

    A hook on the embedding layer: so before dropout, after its reduction over tensor parallel ranks, and on
    whatever part of the sequence and whichever pipeline stage there is. Tied output weights stay as they are.
    """
    if multiplier == 1.0 or not hasattr(model, "embedding"):
        return

    def scale(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(multiplier, dtype=output.dtype, device=output.device)

    model.embedding.word_embeddings.register_forward_hook(scale)


def args_from_model_flags(
    flags: Mapping[str, Any], *, world_size: int | None = None, **others: Any
) -> argparse.Namespace:
    """Validated flags of the training script for a model that is given by its model flags; reads no data.

    Args:
        flags: model flags, as in a checkpoint's manifest or from
            `helix_megatron.checkpoint.families.Family.model_flags`. Flags that are missing have the training
            script's defaults. The vocabulary is padded as the training script would pad it for the tensor
            parallel size.
        world_size: ranks; tensor times pipeline parallel size when not given.
        **others: further flags by their destination names, such as `tensor_model_parallel_size`,
            `intra_head_parallel_size`, `sequence_parallel`, `seq_length`; they win. Without `seq_length`
            it is the default, or the longest sequence that the model's positions allow.

    Raises:
        HelixError: an unknown flag, or flags that do not fit.
    """
    args = build_parser().parse_args([])
    given = {name: value for name, value in flags.items() if name != "padded_vocab_size"} | others
    for name, value in given.items():
        if name not in vars(args):
            close = difflib.get_close_matches(name, vars(args), n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise HelixError(f"the training script has no flag {name!r}.{hint}")
        setattr(args, name, value)
    if args.vocab_size is None:
        args.vocab_size = flags.get("padded_vocab_size")
    if args.vocab_size is None:
        raise HelixError("model flags without vocab_size or padded_vocab_size: give either.")
    if "seq_length" not in given and args.max_position_embeddings is not None:
        args.seq_length = min(args.seq_length, args.max_position_embeddings)
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    check_model(args, world_size or ranks)
    pad_vocabulary(args)
    return args
