"""Flags of the training script: Megatron's names, and a few of our own.

Tables, so that a flag is one line. Each row: flag, type (None for a switch), default, help.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from helix_megatron.arguments import add_helix_arguments
from helix_megatron.training.checkpoint_flags import checkpoint_defaults, find_checkpoint
from helix_megatron.training.layer_patterns import layer_pattern
from helix_megatron.training.presets import PRESETS

Row = tuple[str, Any, Any, str]

MODEL: tuple[Row, ...] = (
    ("--num-layers", int, 4, "transformer layers"),
    ("--hidden-size", int, 128, "hidden size"),
    ("--ffn-hidden-size", int, None, "MLP hidden size; 4 times the hidden size when not given"),
    ("--num-attention-heads", int, 2, "query heads"),
    ("--group-query-attention", None, False, "use --num-query-groups key-value heads"),
    ("--num-query-groups", int, 1, "key-value heads, with --group-query-attention"),
    ("--kv-channels", int, None, "dimensions of a head; hidden size over heads when not given"),
    ("--seq-length", int, 128, "tokens of a sample"),
    ("--max-position-embeddings", int, None, "longest sequence; --seq-length when not given"),
    (
        "--position-embedding-type",
        ("rope", "learned_absolute", "none"),
        "rope",
        "position embedding",
    ),
    ("--rotary-base", int, 10000, "base period of rotary embedding"),
    ("--rotary-percent", float, 1.0, "share of a head's dimensions that is rotated"),
    ("--rotary-interleaved", None, False, "rotate pairs (2k, 2k+1) instead of (k, k + d/2)"),
    (
        "--rotary-seq-len-interpolation-factor",
        float,
        None,
        "divide positions by this before rotation (linear scaling of rotary embedding)",
    ),
    ("--use-rope-scaling", None, False, "scale rotary frequencies as Llama 3.1 and later do"),
    ("--rope-scaling-factor", float, 8.0, "factor of the lowest frequencies, with the former"),
    (
        "--embedding-multiplier",
        float,
        1.0,
        "multiply word embeddings by this, rounded to their dtype (Gemma: square root of the hidden size)",
    ),
    ("--normalization", ("LayerNorm", "RMSNorm"), "LayerNorm", "norm of the hidden states"),
    ("--norm-epsilon", float, 1e-5, "epsilon of the norms"),
    ("--apply-layernorm-1p", None, False, "store weights of norms minus 1, as Gemma does"),
    ("--swiglu", None, False, "gated MLP with SiLU instead of GELU"),
    ("--geglu", None, False, "gated MLP with tanh-approximated GELU, as Gemma has"),
    (
        "--openai-gelu",
        None,
        False,
        "tanh-approximated GELU, as GPT-2 has, instead of the exact one",
    ),
    ("--disable-bias-linear", None, False, "no biases in linear layers"),
    ("--add-qkv-bias", None, False, "biases in linear_qkv even so"),
    ("--qk-layernorm", None, False, "normalise queries and keys of each head"),
    ("--qk-l2-norm", None, False, "normalise queries and keys by their L2 norm"),
    ("--attention-output-gate", None, False, "gate the attention output"),
    ("--window-size", int, None, "sliding window: keys before the query that it sees"),
    (
        "--window-attn-skip-freq",
        layer_pattern,
        None,
        "every n-th layer has no window; or a list with 1 for each layer that has, such as [0,1,1]",
    ),
    (
        "--untie-embeddings-and-output-weights",
        None,
        False,
        "an output layer with weights of its own",
    ),
    ("--attention-dropout", float, 0.0, "dropout of attention weights"),
    ("--hidden-dropout", float, 0.0, "dropout of hidden states"),
    ("--init-method-std", float, 0.02, "standard deviation of initial weights"),
    ("--vocab-size", int, None, "vocabulary; the tokenizer's when not given"),
    (
        "--make-vocab-size-divisible-by",
        int,
        128,
        "pad the vocabulary to a multiple of this and of TP, so that it does not depend on TP where TP "
        "divides it",
    ),
    (
        "--transformer-impl",
        ("local", "transformer_engine"),
        None,
        "Transformer Engine's layers where it is installed, Megatron's local ones otherwise",
    ),
)

EXPERTS: tuple[Row, ...] = (
    ("--num-experts", int, None, "experts of every MoE layer; none makes a dense model"),
    (
        "--moe-layer-freq",
        layer_pattern,
        1,
        "every n-th layer is an MoE layer; or a list with 1 for each that is, such as [0,1,1] or [0]+[1]*2",
    ),
    (
        "--moe-ffn-hidden-size",
        int,
        None,
        "hidden size of an expert; --ffn-hidden-size when not given",
    ),
    ("--moe-router-topk", int, 2, "experts of a token"),
    (
        "--moe-router-pre-softmax",
        None,
        False,
        "weigh a token's experts by the softmax over all experts instead of over its own",
    ),
    (
        "--moe-router-load-balancing-type",
        ("aux_loss", "seq_aux_loss", "none"),
        "aux_loss",
        "how experts are balanced",
    ),
    ("--moe-aux-loss-coeff", float, 0.01, "weight of the load-balancing loss"),
    (
        "--moe-token-dispatcher-type",
        ("allgather", "alltoall"),
        "alltoall",
        "how tokens reach their experts",
    ),
    (
        "--moe-shared-expert-intermediate-size",
        int,
        None,
        "hidden size of experts that all tokens share",
    ),
    ("--moe-shared-expert-gate", None, False, "a gate of its own for the shared experts' output"),
)

PARALLEL: tuple[Row, ...] = (
    ("--tensor-model-parallel-size", int, 1, "tensor parallel ranks p = m·n"),
    ("--pipeline-model-parallel-size", int, 1, "pipeline stages"),
    (
        "--num-layers-per-virtual-pipeline-stage",
        int,
        None,
        "layers of a virtual stage: interleaved schedule",
    ),
    ("--context-parallel-size", int, 1, "context parallel ranks"),
    ("--expert-model-parallel-size", int, 1, "ranks among which experts are dealt"),
    ("--expert-tensor-parallel-size", int, None, "tensor parallel ranks inside an expert"),
    (
        "--sequence-parallel",
        None,
        False,
        "cut the sequence outside attention and MLP over the tensor parallel ranks",
    ),
    (
        "--use-distributed-optimizer",
        None,
        False,
        "cut the optimizer state over data parallel ranks",
    ),
    ("--overlap-grad-reduce", None, False, "reduce gradients during the backward pass"),
    ("--overlap-param-gather", None, False, "gather parameters during the forward pass"),
    (
        "--distributed-backend",
        ("auto", "nccl", "gloo"),
        "auto",
        "back end; auto is nccl on GPUs and gloo without",
    ),
    (
        "--distributed-timeout-minutes",
        float,
        10.0,
        "a collective that takes longer ends the run with a message",
    ),
    (
        "--nproc-per-node",
        int,
        None,
        "start this many ranks on this machine, as torchrun would; leave it out under a launcher",
    ),
)

TRAINING: tuple[Row, ...] = (
    ("--micro-batch-size", int, 4, "samples of a forward pass on one data parallel rank"),
    (
        "--global-batch-size",
        int,
        None,
        "samples of an iteration; one micro-batch per rank when not given",
    ),
    ("--train-iters", int, 50, "iterations"),
    ("--seed", int, 1234, "of weights, data order and dropout, the same at every layout"),
    ("--optimizer", ("adam", "sgd"), "adam", "optimizer"),
    ("--lr", float, 1e-3, "highest learning rate"),
    ("--min-lr", float, 0.0, "lowest learning rate"),
    ("--lr-decay-style", ("constant", "linear", "cosine"), "cosine", "decay of the learning rate"),
    ("--lr-warmup-iters", int, 0, "iterations of linear warm-up"),
    ("--lr-decay-iters", int, None, "iterations of decay; --train-iters when not given"),
    ("--weight-decay", float, 0.01, "weight decay"),
    ("--adam-beta1", float, 0.9, "Adam's beta 1"),
    ("--adam-beta2", float, 0.999, "Adam's beta 2"),
    ("--adam-eps", float, 1e-8, "Adam's epsilon"),
    ("--clip-grad", float, 1.0, "largest gradient norm; 0 clips nothing"),
    ("--bf16", None, False, "train in bf16"),
    ("--fp16", None, False, "train in fp16 with loss scaling"),
    ("--loss-scale", float, None, "fixed loss scale for fp16; dynamic when not given"),
    ("--initial-loss-scale", float, 2.0**32, "first dynamic loss scale"),
    (
        "--recompute-granularity",
        ("selective", "full"),
        None,
        "recompute core attention, or whole layers, in the backward pass",
    ),
    (
        "--recompute-method",
        ("uniform", "block"),
        "uniform",
        "which layers are recomputed, with full",
    ),
    ("--recompute-num-layers", int, 1, "layers of a recomputed unit, with full"),
)

DATA: tuple[Row, ...] = (
    (
        "--text",
        str,
        None,
        "text files, read as bytes; the Python language reference when neither this nor --data-path "
        "is given",
    ),
    ("--data-path", str, None, "prefix of Megatron's .bin/.idx, or weights and prefixes"),
    ("--data-cache-path", str, None, "directory for the indices of --data-path"),
    (
        "--tokenizer-type",
        ("HuggingFaceTokenizer", "byte"),
        None,
        "tokenizer of --data-path; byte without --tokenizer-model",
    ),
    ("--tokenizer-model", str, None, "a Hugging Face tokenizers file (tokenizer.json)"),
    ("--split", str, "969,30,1", "shares for training, validation and test"),
)

CHECKPOINTING: tuple[Row, ...] = (
    ("--save", str, None, "directory for checkpoints; one is also saved after the last iteration"),
    ("--save-interval", int, None, "save every so many iterations"),
    ("--keep", int, None, "keep the newest so many checkpoints; all of them when not given"),
    (
        "--async-save",
        None,
        False,
        "write in the background while training goes on; a checkpoint is complete some iterations later",
    ),
    ("--no-save-optim", None, False, "save no optimizer state"),
    ("--no-save-rng", None, False, "save no random states"),
    (
        "--load",
        str,
        None,
        "directory of checkpoints to go on from: of this script, of stock Megatron, or converted; saved at any "
        "layout. With the directory of --save a first start finds nothing and begins anew",
    ),
    ("--ckpt-step", int, None, "load the checkpoint of this iteration; the newest when not given"),
    (
        "--exit-on-missing-checkpoint",
        None,
        False,
        "do not begin anew where --load finds nothing",
    ),
    ("--no-load-optim", None, False, "load no optimizer state"),
    ("--no-load-rng", None, False, "load no random states"),
    ("--finetune", None, False, "load weights only, and begin at iteration 0"),
    ("--use-checkpoint-args", None, False, "take the model's flags from the checkpoint"),
    (
        "--override-opt-param-scheduler",
        None,
        False,
        "take learning rate and weight decay of this command, not the checkpoint's",
    ),
    (
        "--use-checkpoint-opt-param-scheduler",
        None,
        False,
        "take learning rate and weight decay of the checkpoint, not this command's",
    ),
    (
        "--trust-checkpoint",
        None,
        False,
        "read pickles that could run code of whoever wrote them; only for files that are your own",
    ),
    (
        "--allow-quality-loss",
        None,
        False,
        "load ordinary weights into segment-local attention, which is another architecture",
    ),
    ("--exit-interval", int, None, "end after an iteration that is a multiple of this"),
    ("--exit-duration-in-mins", float, None, "save and end after so many minutes"),
    ("--exit-signal-handler", None, False, "save and end on SIGTERM; at once on one 5 s later"),
)

LOGGING: tuple[Row, ...] = (
    ("--log-interval", int, 10, "print every so many iterations where a line cannot be rewritten"),
    ("--eval-interval", int, 0, "validate every so many iterations, and after the last; 0 never"),
    ("--eval-iters", int, 5, "batches of a validation"),
    ("--metrics-jsonl", str, None, "write one JSON object per iteration to this file"),
    ("--tensorboard-dir", str, None, "write TensorBoard events to this directory"),
    ("--wandb-project", str, None, "log to this Weights & Biases project"),
    ("--run-name", str, None, "name of the run in tables and reports"),
    (
        "--log-communication-time",
        ("auto", "total", "exposed", "off"),
        "auto",
        "time collectives: total, each one, without overlap; exposed, only while computation waits for it; "
        "auto is total on CPU and off on a GPU",
    ),
    ("--check", None, False, "check everything that can be checked without starting, then stop"),
    (
        "--explain",
        None,
        False,
        "like --check, and show the groups of ranks and the choice of exchange",
    ),
)

GROUPS = {
    "model": MODEL,
    "mixture of experts": EXPERTS,
    "parallelism": PARALLEL,
    "training": TRAINING,
    "data": DATA,
    "checkpoints": CHECKPOINTING,
    "logging": LOGGING,
}
SEVERAL = ("--text", "--data-path")
PROGRAM = "pretrain_gpt.py"


def build_parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """The training script's parser; `prog` is the program that its usage and errors name."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a GPT, dense or mixture-of-experts, with attention on m × n ranks.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="defaults for the paper's 4-layer dense or 8-expert model, at full size (16 ranks) or small "
        "(4 ranks)",
    )
    for title, rows in GROUPS.items():
        group = parser.add_argument_group(title)
        for row in rows:
            _add(group, row)
    return add_helix_arguments(parser)


def parse_args(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> argparse.Namespace:
    """Parse; `helix_megatron.training.validate.validate` checks what the values mean together.

    A preset, or the checkpoint with `--use-checkpoint-args`, gives other defaults; flags given beside it win.

    Args:
        argv: the flags; those of the command line when not given.
        prog: the program that usage and errors name.

    Raises:
        HelixError: `--use-checkpoint-args` and no checkpoint that can be read.
    """
    parser = build_parser(prog)
    first = parser.parse_known_args(argv)[0]
    if first.preset is not None:
        parser.set_defaults(**PRESETS[first.preset])
    if first.use_checkpoint_args:
        path = find_checkpoint(first)
        if path is not None:
            parser.set_defaults(**checkpoint_defaults(path, first))
    return parser.parse_args(argv)


def _add(group: Any, row: Row) -> None:
    flag, kind, default, text = row
    text = text.replace("%", "%%")
    if default is not None and kind is not None:
        text += " (default: %(default)s)"
    if kind is None:
        group.add_argument(flag, action="store_true", help=text)
    elif isinstance(kind, tuple):
        group.add_argument(flag, choices=kind, default=default, help=text)
    else:
        nargs = "+" if flag in SEVERAL else None
        group.add_argument(flag, type=kind, default=default, nargs=nargs, help=text)
