"""Patterns of layers, and what options of the model mean together."""

from __future__ import annotations

import argparse
import ast

from helix_megatron.errors import HelixError, listed

ACTIVATIONS = ("swiglu", "geglu", "openai_gelu")


def layer_pattern(text: str) -> int | list[int]:
    """A whole number of at least 1, or a list of 0 and 1 in Python's notation, with + and *: `([0]+[1]*2)*4`.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        value = None
    if isinstance(value, int) and value >= 1:
        return value
    if isinstance(value, list) and value and set(value) <= {0, 1}:
        return value
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither a whole number of at least 1 nor a list of 0 and 1 for the layers, such as "
        "[0,1,1] or [0]+[1]*2"
    )


def _evaluate(node: ast.expr) -> int | list[int]:
    """Sums and products of numbers and lists of numbers; nothing else is evaluated."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        elements = [_evaluate(element) for element in node.elts]
        if all(isinstance(element, int) for element in elements):
            return elements  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right  # type: ignore[operator]
    raise ValueError("not a pattern")


def check_options(args: argparse.Namespace) -> None:
    """Options of the model against each other.

    Raises:
        HelixError: with the values and what to try.
    """
    chosen = [name for name in ACTIVATIONS if getattr(args, name)]
    if len(chosen) > 1:
        flags = ["--" + name.replace("_", "-") for name in chosen]
        raise HelixError(f"{listed(flags)} exclude each other. Give one of them.")
    for name in (
        "embedding_multiplier",
        "rope_scaling_factor",
        "rotary_seq_len_interpolation_factor",
    ):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise HelixError(f"--{name.replace('_', '-')} is {value}. It must be above 0.")
    rotary = args.position_embedding_type == "rope"
    if not rotary and (args.use_rope_scaling or args.rotary_seq_len_interpolation_factor):
        raise HelixError(
            "--use-rope-scaling and --rotary-seq-len-interpolation-factor scale rotary embedding, and "
            f"--position-embedding-type is {args.position_embedding_type}. Leave them out."
        )
    if args.window_attn_skip_freq is not None and args.window_size is None:
        raise HelixError(
            "--window-attn-skip-freq says which layers have a sliding window, and there is none. Add "
            "--window-size, or leave it out."
        )
    _check_length(args, "window_attn_skip_freq")
    if args.num_experts is not None:
        _check_length(args, "moe_layer_freq")
        _check_experts(args)


def _check_length(args: argparse.Namespace, name: str) -> None:
    pattern = getattr(args, name)
    flag = "--" + name.replace("_", "-")
    if isinstance(pattern, list) and len(pattern) != args.num_layers:
        raise HelixError(
            f"{flag} lists {len(pattern)} layers, and --num-layers is {args.num_layers}. List all of them."
        )


def _check_experts(args: argparse.Namespace) -> None:
    if isinstance(args.moe_layer_freq, list) and 1 not in args.moe_layer_freq:
        raise HelixError(
            "--moe-layer-freq gives experts to no layer. Leave out --num-experts for a dense model."
        )
    if args.moe_router_topk == 1 and not args.moe_router_pre_softmax:
        raise HelixError(
            "--moe-router-topk 1 needs --moe-router-pre-softmax: the softmax over one expert is always 1, and "
            "the router would not learn."
        )
    if args.moe_shared_expert_gate and args.moe_shared_expert_intermediate_size is None:
        raise HelixError(
            "--moe-shared-expert-gate gates shared experts, and there are none. Add "
            "--moe-shared-expert-intermediate-size, or leave it out."
        )
