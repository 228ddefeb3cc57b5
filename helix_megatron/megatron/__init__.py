"""Helix inside megatron-core: the layer and its specs, checkpoints, and a runtime without a GPU."""

import sys
from typing import Any
from unittest import mock

from helix_megatron import versions

versions.require("torch", "megatron-core")


def _import_core_without_its_compiler() -> None:
    """Import megatron-core so that its fused functions stay plain ones, where there is no GPU.

    torch.compile decorates them (megatron/core/jit.py), and imports torch's compiler for it: a second of every
    process's start, for functions that `cpu_runtime` would not have compiled.
    """
    import torch

    if "megatron.core" not in sys.modules and not torch.cuda.is_available():
        with mock.patch("torch.compile", _plain):
            import megatron.core  # noqa: F401


def _plain(function: Any = None, **settings: Any) -> Any:
    return function if function is not None else _plain


_import_core_without_its_compiler()
