"""Patterns of layers: which of them have experts, or a sliding window."""

from __future__ import annotations

import argparse
import ast

Pattern = int | tuple[int, ...]


def layer_pattern(text: str) -> Pattern:
    """A whole number of at least 1, or a list of 0 and 1 in Python's notation, with + and *: `([0]+[1]*2)*4`.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        value = None
    if is_pattern(value):
        return tuple(value) if isinstance(value, list) else value  # type: ignore[return-value]
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither a whole number of at least 1 nor a list of 0 and 1 for the layers, such as "
        "[0,1,1] or [0]+[1]*2"
    )


def is_pattern(value: object) -> bool:
    """Whether this is a whole number of at least 1, or a list of 0 and 1."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(one, int) and one in (0, 1) for one in value)
    return isinstance(value, int) and value >= 1


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
