"""Layers of a `transformers` model that keep a state and no keys: linear attention, Mamba, gated delta nets.

In a step the tokens of many sequences lie one after the other. Such a layer computes the sequences that add one
token, as most do, together, and longer pieces one by one, each with a cache of the library's own that holds its
states beside the engine's pages. A sequence that is preempted loses its states with its pages, and both are
computed anew.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helix_megatron.core.caches.pages import Piece
from helix_megatron.core.device import on_device
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
        self._device = next(model.parameters()).device
        self._together = Together((), self._caches)
        self._parts: list[tuple[slice, Any]] = [(slice(None), None)]
        self._rows: Tensor | None = None  # of the step's tokens, those of `_together`
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
        steps = [p.start > 0 and len(p.tokens) == 1 for p in pieces]
        members = tuple(p.sequence for p, step in zip(pieces, steps, strict=True) if step)
        if members != self._together.members:
            self._together.part(self._caches)
        for piece in pieces:
            if piece.start == 0:
                self._caches[piece.sequence] = DynamicCache(config=self._config)
        if members != self._together.members:
            self._together = Together(members, self._caches)
        ends = np.cumsum([len(piece.tokens) for piece in pieces])
        self._parts = [
            (slice(end - len(p.tokens), end), self._caches[p.sequence])
            for p, end, step in zip(pieces, ends.tolist(), steps, strict=True)
            if not step
        ]
        self._rows = on_device(ends[steps] - 1, self._device) if members else None

    def drop(self, sequence: int) -> None:
        """Forget a sequence, which may have no states."""
        self._caches.pop(sequence, None)
        if self._caches.keys().isdisjoint(self._together.members):
            self._together = Together((), self._caches)

    def __len__(self) -> int:
        return len(self._caches)

    def _in_parts(self, forward: Any) -> Any:
        def in_parts(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            parts: list[tuple[slice | Tensor, Tensor]] = [
                (rows, forward(hidden_states[:, rows], *args, **kwargs | {CACHE: cache}))
                for rows, cache in self._parts
            ]
            if self._rows is not None:
                tokens = hidden_states[:, self._rows].transpose(0, 1)
                batch = forward(tokens, *args, **kwargs | {CACHE: self._together.cache})
                parts.append((self._rows, batch.transpose(0, 1)))
            outputs = parts[0][1].new_empty(hidden_states.shape)
            for rows, part in parts:
                outputs[:, rows] = part
            return outputs

        return in_parts


class Together:
    """The states of some sequences as one cache, with a row for each, for as long as nobody comes or goes.

    Args:
        members: the sequences.
        caches: of all sequences; those of the members have states, which are taken out of them.

    Attributes:
        cache: the library's, of a batch.
    """

    def __init__(self, members: Sequence[int], caches: Mapping[int, Any]) -> None:
        self.members = tuple(members)
        own = [caches[sequence] for sequence in members]
        if not own:
            return
        self.cache = copy.copy(own[0])
        self.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for place, layer in enumerate(self.cache.layers):
            for name, states in _tables(layer).items():
                tables = [getattr(one.layers[place], name) for one in own]
                rows = {key: torch.cat([one.pop(key) for one in tables]) for key in states}
                setattr(layer, name, vars(layer)[name] | rows)

    def part(self, caches: Mapping[int, Any]) -> None:
        """Give the members that are still among `caches` their states back."""
        for row, sequence in enumerate(self.members):
            if sequence in caches:
                for own, layer in zip(caches[sequence].layers, self.cache.layers, strict=True):
                    for name, states in _tables(layer).items():
                        one = {key: rows[row : row + 1] for key, rows in states.items()}
                        getattr(own, name).update(one)


def _tables(layer: Any) -> dict[str, dict[Any, Tensor]]:
    """The states of a cache's layer: the tensors that it keeps in tables."""
    tables = {name: table for name, table in vars(layer).items() if isinstance(table, dict)}
    return {
        name: {key: one for key, one in table.items() if isinstance(one, Tensor)}
        for name, table in tables.items()
    }
