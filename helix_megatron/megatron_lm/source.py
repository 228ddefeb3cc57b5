"""Where a name is defined in a Megatron-LM checkout, by reading the source and importing nothing."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

from helix_megatron.errors import HelixError
from helix_megatron.versions import constants


@dataclass(frozen=True)
class Place:
    """A line of a file of the checkout; the path is relative to it."""

    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


def core_version(checkout: Path) -> tuple[int, ...]:
    """(major, minor, patch) of a checkout's megatron.core."""
    tree = _tree(checkout / "megatron" / "core" / "package_info.py")
    if tree is None:
        raise HelixError(
            f"{checkout} has no megatron/core/package_info.py, so it is no checkout of Megatron-LM. Give the "
            "folder that holds pretrain_gpt.py and megatron/."
        )
    numbers = constants(tree)
    try:
        return tuple(int(numbers[name]) for name in ("MAJOR", "MINOR", "PATCH"))
    except (KeyError, TypeError, ValueError) as error:
        raise HelixError(
            f"{checkout}/megatron/core/package_info.py does not say MAJOR, MINOR and PATCH, so this is a "
            "version that Helix does not know."
        ) from error


def find(checkout: Path, target: str) -> Place | None:
    """Where `module:attribute` or `module:Class.attribute` is; None if it is not there.

    A name that a module imports counts as one of its attributes: its place is the import.
    """
    module, _, attributes = target.partition(":")
    base = checkout.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        tree = _tree(path)
        if tree is not None:
            node = _member(tree, attributes.split("."))
            return Place(path.relative_to(checkout), node.lineno) if node is not None else None
    return None


def entry_point(script: Path) -> int | None:
    tree = _tree(script)
    for node in tree.body if tree else []:
        if isinstance(node, ast.If) and "__name__" in ast.dump(node.test):
            return node.lineno
    return None


def bypasses(checkout: Path, target: str, replaced: set[str]) -> list[Place]:
    """Calls in the training loop that would not meet the replacement of a function `module:name`.

    A module that has imported the function by name keeps upstream's, unless its own attribute is `replaced`
    as well. An import inside a function happens at the call, and finds the replacement.
    Classes are changed in place, so methods have no such calls.
    """
    name = target.partition(":")[2]
    if "." in name:
        return []
    found = []
    for path in [*checkout.glob("*.py"), *checkout.glob("megatron/training/*.py")]:
        tree = _tree(path)
        module = ".".join(path.relative_to(checkout).with_suffix("").parts)
        if tree is None or f"{module}:{name}" in replaced:
            continue
        imported = [
            node
            for node in _statements(tree.body)
            if isinstance(node, ast.ImportFrom)
            and any(alias.name == name and alias.asname in (None, name) for alias in node.names)
        ]
        called = any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
            for node in ast.walk(tree)
        )
        if called:
            found += [Place(path.relative_to(checkout), node.lineno) for node in imported]
    return found


@functools.cache
def _tree(path: Path) -> ast.Module | None:
    if not path.is_file():
        return None
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise HelixError(f"{path} cannot be read as Python: {error}.") from error


def _member(tree: ast.Module | ast.ClassDef, names: list[str]) -> ast.stmt | None:
    first, *rest = names
    for node in _statements(tree.body):
        if first not in _defined(node):
            continue
        if not rest:
            return node
        return _member(node, rest) if isinstance(node, ast.ClassDef) else None
    return None


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements of a module or class, those inside `if` and `try` included, later ones first."""
    found: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            for part in ("body", "orelse", "finalbody"):
                found += _statements(getattr(node, part, []))[::-1]
            for handler in getattr(node, "handlers", []):
                found += _statements(handler.body)[::-1]
        else:
            found.append(node)
    return found[::-1]


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return {target.id for target in targets if isinstance(target, ast.Name)}
