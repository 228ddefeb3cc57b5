"""Layers of a `transformers` model that keep a state and no keys: linear attention, Mamba, gated delta nets.

In a step the tokens of many sequences lie one after the other. Such a layer computes them sequence by sequence,
each with a cache of the library's own, which holds its states beside the engine's pages. A sequence that is
preempted loses its states with its pages, and both are computed anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helix_megatron.core.caches.pages import Piece
from helix_megatron.errors import HelixError

CACHE = "cache"  # what the layers call it


class States:
    """The states of all sequences on one rank: of its own heads of a layer that is cut, of all others whole.

    Args:
        model: of `transformers`.
        paths: of its layers with states.
    """

    def __init__(self, model: Any, paths: Sequence[str]) -> None:
        self._config, self._paths, self._caches = model.config, paths, dict[int, Any]()
        self._parts: list[tuple[slice, Any]] = [(slice(None), None)]
        for path in paths:
            module = model.get_submodule(path)
            classes: list[Any] = [kind for kind in type(module).__mro__ if "forward" in vars(kind)]
            if not any(CACHE in inspect.signature(kind.forward).parameters for kind in classes):
                raise HelixError(
                    f"{type(module).__name__} of this release of transformers keeps its states in another way. "
                    "Try pip install 'transformers>=5.24'."
                )
            module.forward = self._in_parts(module.forward)

    def begin(self, pieces: Sequence[Piece]) -> None:
        """The step's tokens, in this order. A piece that begins its sequence begins new states."""
        from transformers import DynamicCache

        if not self._paths:
            return
        self._parts, row = [], 0
        for piece in pieces:
            if piece.start == 0:
                self._caches[piece.sequence] = DynamicCache(config=self._config)
            rows = slice(row, row + len(piece.tokens))
            self._parts.append((rows, self._caches[piece.sequence]))
            row = rows.stop

    def drop(self, sequence: int) -> None:
        """Forget a sequence, which may have no states."""
        self._caches.pop(sequence, None)

    def __len__(self) -> int:
        return len(self._caches)

    def _in_parts(self, forward: Any) -> Any:
        def in_parts(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            outputs = [
                forward(hidden_states[:, rows], *args, **kwargs | {CACHE: cache})
                for rows, cache in self._parts
            ]
            return torch.cat(outputs, dim=1)

        return in_parts
