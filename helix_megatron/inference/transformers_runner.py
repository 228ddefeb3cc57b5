"""One rank's share of a step of a `transformers` model, cut in place, whose attention is the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.caches import DecodeShape, cache_layout
from helix_megatron.core.caches.attention import LocalAttention
from helix_megatron.core.caches.book import PageBook
from helix_megatron.core.caches.paged import KeptHeads, PagedCache
from helix_megatron.core.caches.pages import Piece
from helix_megatron.core.caches.windows import BookPair
from helix_megatron.core.device import on_device
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError
from helix_megatron.huggingface.forms import SHOWN
from helix_megatron.inference.runner import Pools, Runner, make_book, make_tables
from helix_megatron.inference.step import StepPlan
from helix_megatron.inference.transformers_attention import INSTEAD, NAME, Asked, Layer, register
from helix_megatron.inference.transformers_states import States
from helix_megatron.model.families import CUTTABLE

# Tokens that every model has, of two sequences, with which a model is compared with itself.
PROBES = (np.arange(16) * 5 % 11, np.arange(9) * 7 % 11)


class PagedModel:
    """A model whose attention modules answer to the engine, and what they turned out to ask for.

    It runs once, on all ranks together: so what every layer keeps, its window and its sinks are those of the
    model's own code, whatever its configuration calls them.

    Args:
        model: of `transformers`, whole or cut by `helix_megatron.huggingface`, in eval mode.
        attention: the paths of its attention modules.
        recurrent: the paths of its layers that keep a state and no keys.
        group: the ranks that hold the model together.
        head_group: those among them that share key-value heads.
    """

    def __init__(
        self,
        model: Any,
        attention: Sequence[str],
        recurrent: Sequence[str],
        group: ProcessGroup,
        head_group: ProcessGroup,
    ) -> None:
        self.model, self.group, self.head_group = model, group, head_group
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        kind = getattr(model.config, "model_type", None)
        self.layers: list[Layer] = []
        self.before: list[Tensor] = []
        if kind not in CUTTABLE and kind not in SHOWN:
            self.before = [self._alone(tokens) for tokens in PROBES]
        self.recurrent = tuple(recurrent)
        self.states = States(model, recurrent)
        register()
        model.set_attn_implementation(NAME)
        for path in attention:
            module = model.get_submodule(path)
            module.step_layer = Layer(module, head_group)
            self.layers.append(module.step_layer)
        self._alone(PROBES[0])
        silent = [
            path for path, layer in zip(attention, self.layers, strict=True) if layer.asked is None
        ]
        if silent:
            raise HelixError(
                f"{type(model).__name__} computes the attention of {silent[0]} without the library's attention "
                f"functions, so the engine has no part in it. {INSTEAD}"
            )
        self.asked = self._number_layers()

    def _number_layers(self) -> list[Asked]:
        """What each layer with pages asked for.

        Layers that attend to another's keys (Gemma 4 E2B) have its pages, and write the same into them again.
        """
        first: list[Layer] = []
        for layer in self.layers:
            keys = [other.noted_key for other in first]
            layer.index = next((i for i, k in enumerate(keys) if k is layer.noted_key), len(first))
            if layer.index == len(first):
                first.append(layer)
        for layer in self.layers:
            layer.noted_key = None
        return [layer.asked for layer in first if layer.asked is not None]

    def kept(self, pools: Pools) -> list[KeptHeads]:
        """What a rank keeps of each layer."""
        return [asked.kept(*pools.of(asked.scores.window)) for asked in self.asked]

    def _alone(self, tokens: np.ndarray) -> Tensor:
        places = np.arange(len(tokens))
        return self.logits(tokens, places, places)

    def shape(
        self, layout: HeadLayout, sequences: int, context: int, element_size: int
    ) -> DecodeShape:
        """What the first layer's attention computes and keeps in a step."""
        first = self.asked[0]
        return DecodeShape(
            layout,
            sequences,
            context,
            element_size,
            value_dim=first.value_dim,
            whole_keys=True,
            latent=first.latent,
        )

    @torch.inference_mode()
    def logits(self, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> Tensor:
        """Logits [rows, vocabulary] of some rows of a step's tokens, in at least fp32, on all ranks."""
        ids, places, wanted = (on_device(array, self.device) for array in (tokens, positions, rows))
        for layer in self.layers:
            layer.positions = places
        output = self.model(
            input_ids=ids.unsqueeze(0),
            position_ids=places.unsqueeze(0),
            use_cache=False,
            logits_to_keep=wanted,
        )
        logits: Tensor = output.logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class TransformersRunner(Runner):
    """A `PagedModel` with pages.

    Args:
        model: what computes.
        layout: how the heads of its cache lie on the ranks.
        cache: the name of a cache layout that keeps whole heads.
        pages: how many pages this rank's pools have.
        page_size: how many positions a page has.
        vocab_size: how many tokens there are.

    Raises:
        HelixError: a model of a type that is not known gives other logits in the engine than by itself.
    """

    def __init__(
        self,
        model: PagedModel,
        layout: HeadLayout,
        *,
        cache: str,
        pages: int | Pools,
        page_size: int,
        vocab_size: int,
    ) -> None:
        self.model, self.layout, self.vocab_size = model, layout, vocab_size
        self.group, self.device, self.dtype = model.group, model.device, model.dtype
        pools = pages if isinstance(pages, Pools) else Pools(pages)
        self.tables = make_tables(cache, layout.segments, pools.kinds, page_size)
        kept = model.kept(pools)
        self.cache = PagedCache(kept, page_size, self.dtype, self.device)
        attention_of = LocalAttention if layout.segments == 1 else cache_layout(cache).attention
        self.attentions = [
            attention_of(layout, model.head_group, tables, self.cache) for tables in self.tables
        ]
        for layer in model.layers:
            layer.attention = self.attentions[kept[layer.index].kind]
            layer.attention.windows.add(model.asked[layer.index].scores.window)
        if model.before:
            self._check_probe(model.before, make_book(cache, layout.segments, pools, page_size))

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        super()._prepare(pieces)
        if self.model.recurrent:
            self.model.states.begin(pieces)

    def _drop(self, sequence: int) -> None:
        self.model.states.drop(sequence)

    def _compute(
        self, tokens: np.ndarray, positions: np.ndarray, wanted: np.ndarray
    ) -> Tensor | None:
        rows = wanted if len(wanted) else np.zeros(1, dtype=np.int64)
        logits = self.model.logits(tokens, positions, rows)
        return logits[:, : self.vocab_size] if len(wanted) and self.group.rank() == 0 else None

    def _check_probe(self, before: Sequence[Tensor], book: PageBook | BookPair) -> None:
        """Raise unless steps give the logits that the model gave by itself. Collective.

        Two sequences are computed together, one of them in two parts: what sees other tokens of a step, or
        forgets a part, is found out.
        """
        if not book.fits(sum(map(len, PROBES)) + self.cache.page_size):
            return  # less cache than the probes have tokens
        first, second = PROBES
        cut = len(first) // 2
        found: list[list[Tensor]] = [[], []]
        for number in range(len(PROBES)):
            book.add(number, 0)
        for parts in (((0, first, 0, cut), (1, second, 0, len(second))), ((0, first, cut, None),)):
            pieces = []
            for number, tokens, start, stop in parts:
                part = tokens[start:stop]
                assert book.grow(number, start + len(part)), "there is room for all of them"
                pieces.append(Piece(number, start, part, 0, book.tell(number), len(part)))
            self._keep_tables(StepPlan(pieces=tuple(pieces)))
            self._prepare(pieces)
            tokens = np.concatenate([piece.tokens for piece in pieces])
            places = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])
            logits = self.model.logits(tokens, places, np.arange(len(tokens)))
            for piece, rows in zip(
                pieces, logits.split([len(piece.tokens) for piece in pieces]), strict=True
            ):
                found[piece.sequence].append(rows)
        self._keep_tables(StepPlan(drops=tuple(range(len(PROBES)))))
        after, wanted = torch.cat([torch.cat(rows) for rows in found]), torch.cat(list(before))
        error = float((after - wanted).abs().max() / wanted.abs().max())
        if not error <= (1e-4 if self.dtype in (torch.float32, torch.float64) else 5e-2):
            raise HelixError(
                f"models of type {self.model.model.config.model_type} are not known to this release, and this "
                f"one gives other logits in the engine than by itself, by {error:.1e} of the largest. {INSTEAD}"
            )
