"""Sinks, soft caps and windows in a step, in fp64: every cache layout, queries cut and dealt whole."""

from __future__ import annotations

from typing import Any

import inference_models as models
import pytest
import torch
import torch.distributed as dist

from helix_megatron.core.caches import NAMES, cache_layout
from helix_megatron.core.caches.attention import Scores
from helix_megatron.core.caches.paged import KeptHeads, PagedCache
from helix_megatron.core.layout import HeadLayout
from helix_megatron.inference.runner import kept_dims, make_book, make_tables

HEADS, GROUPS, DIMS, LENGTHS = 8, 2, 16, (23, 9)
SCORES = {
    "sinks": (None, None, True),
    "soft cap": (None, 0.7, False),
    "all of it": ((6, 0), 0.7, True),
}


def inputs() -> list[torch.Tensor]:
    """Queries, keys and values of both sequences, one behind the other, and sinks."""
    random = torch.Generator().manual_seed(8)
    shapes = ((sum(LENGTHS), HEADS, DIMS), *((sum(LENGTHS), GROUPS, DIMS),) * 2, (HEADS,))
    return [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]


def wanted(name: str) -> torch.Tensor:
    """Softmax over the keys that each query sees, written out."""
    window, softcap, has_sinks = SCORES[name]
    q, k, v, sinks = inputs()
    output, first = torch.zeros_like(q), 0
    for length in LENGTHS:
        for at in range(length):
            seen = slice(first + (max(0, at - window[0]) if window else 0), first + at + 1)
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = k[seen, group] @ q[first + at, head] * 0.3
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                total = weights.sum() + (sinks[head].exp() if has_sinks else 0.0)
                output[first + at, head] = weights @ v[seen, group] / total
        first += length
    return output


def found(name: str, query_layout: Any) -> dict[str, torch.Tensor]:
    """This rank's part by each cache layout: both sequences in chunks of 7, then token by token."""
    window, softcap, has_sinks = SCORES[name]
    group: Any = dist.group.WORLD
    rank, ranks = group.rank(), group.size()
    layout = HeadLayout(HEADS, GROUPS, DIMS, segments=ranks, query_layout=query_layout)
    q, k, v, sinks = inputs()
    scores = Scores(0.3, window, softcap, sinks if has_sinks else None)
    dims = layout.segment_dims(rank)
    own_q = q[:, list(layout.query_heads(rank))]
    own_q = own_q if query_layout == "heads" else own_q[..., dims]
    outputs = {}
    for cache in NAMES:
        book = make_book(cache, ranks, 40, models.PAGE)
        width = kept_dims(layout, cache, False)
        kept = KeptHeads(40, GROUPS, width, width)
        pages = PagedCache([kept], models.PAGE, torch.float64, torch.device("cpu"))
        (tables,) = make_tables(cache, ranks, 1, models.PAGE)
        attention = cache_layout(cache).attention(layout, group, tables, pages)
        attention.windows.add(window)
        output = torch.zeros_like(own_q)
        for number in range(len(LENGTHS)):
            tables.add(number, number % book.members)
        for start in (0, 7, *range(14, max(LENGTHS))):
            stop = start + (7 if start < 14 else 1)
            pieces, rows = [], []
            for number, length in enumerate(LENGTHS):
                if start < length:
                    last = min(stop, length)
                    pieces.append(models.piece_of(book, number, start, [0] * (last - start)))
                    tables.extend(number, pieces[-1].pages)
                    rows += [sum(LENGTHS[:number]) + at for at in range(start, last)]
            attention.prepare(pieces)
            part = attention.attend(0, own_q[rows], k[rows][..., dims], v[rows][..., dims], scores)
            output[rows] = part
        outputs[cache] = output
    return outputs


@pytest.mark.parametrize("query_layout", ["heads", "segments"])
@pytest.mark.parametrize("name", SCORES)
def test_steps_equal_attention_written_out(pool, name, query_layout):
    """Two ranks with half of each key-value head: chunks and single tokens of two sequences together."""
    right = wanted(name)
    layout = HeadLayout(HEADS, GROUPS, DIMS, segments=2, query_layout=query_layout)
    for rank, outputs in enumerate(pool.run(found, name, query_layout, world_size=2)):
        own = right[:, list(layout.query_heads(rank))]
        if query_layout == "segments":
            own = own[..., layout.segment_dims(rank)]
        assert set(outputs) == set(NAMES)
        for cache, output in outputs.items():
            assert (output - own).abs().max() <= 1e-10 * right.abs().max(), cache
