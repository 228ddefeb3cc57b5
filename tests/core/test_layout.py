"""`HeadLayout` deals every row and column to exactly one rank, in the order that stock Megatron's layer reads.

The properties are checked against definitions written out here, not against the layout's own helpers.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import HeadLayout, contiguous_runs

quick = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def layouts(draw: st.DrawFn) -> HeadLayout:
    """Any legal layout: what it must satisfy is put in by construction."""
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kv_heads = n * draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 6))
    rotary = draw(st.sampled_from(["none", "half", "interleaved"]))
    rest = m * draw(st.integers(0, 2))
    rotated = 0 if rotary == "none" else 2 * m * draw(st.integers(1, 3))
    assume(rest + rotated)
    names_all = rest == 0 and draw(st.booleans())
    whole = heads // n % m == 0 and draw(st.booleans())
    return HeadLayout(
        heads,
        kv_heads,
        rest + rotated,
        n,
        m,
        query_layout="heads" if whole else "segments",
        rotary=rotary,
        rotary_dim=None if names_all else rotated,
        output_gate=draw(st.booleans()),
    )


def partner(layout: HeadLayout, dim: int) -> int:
    """The dimension that rotary embedding turns together with `dim`; itself where nothing is turned."""
    rotated = 0 if layout.rotary == "none" else layout.rotary_dim
    if dim >= rotated:
        return dim
    if layout.rotary == "interleaved":
        return dim + 1 if dim % 2 == 0 else dim - 1
    half = rotated // 2
    return dim + half if dim < half else dim - half


def slow_parts(layout: HeadLayout, rank: int) -> tuple[list[int], list[int]]:
    """(qkv rows, proj columns) of a rank, one index at a time, from the words of the module's docstring.

    Only the order of dimensions inside a segment is the layout's own.
    """
    h, g, d = layout.num_heads, layout.num_kv_heads, layout.head_dim
    n, m, r = layout.head_groups, layout.segments, h // g
    i, j = rank // m, rank % m
    cut = [int(dim) for dim in layout.segment_dims(j)]
    blocks = (2 * r if layout.output_gate else r) + 2
    whole = layout.query_layout == "heads"
    first, count = (i * h // n + j * h // n // m, h // n // m) if whole else (i * h // n, h // n)
    queries = [
        (head, dim) for head in range(first, first + count) for dim in (range(d) if whole else cut)
    ]
    per_slot = len(queries) // (g // n)
    rows: list[int] = []
    for slot in range(g // n):
        mine = queries[slot * per_slot : (slot + 1) * per_slot]
        for gate in range(2 if layout.output_gate else 1):
            rows += [((head // r) * blocks + gate * r + head % r) * d + dim for head, dim in mine]
        for block in (blocks - 2, blocks - 1):
            rows += [((i * g // n + slot) * blocks + block) * d + dim for dim in cut]
    return rows, [head * d + dim for head, dim in queries]


# -------------------------------------------------------------------------- properties


@quick
@given(layouts())
def test_every_row_and_column_is_held_exactly_once(layout):
    """A row held twice or by nobody is a wrong checkpoint and a wrong model, without any error."""
    blocks = layout.queries_per_kv_head * (2 if layout.output_gate else 1) + 2
    for held, total in (
        (layout.qkv_rows, layout.num_kv_heads * blocks * layout.head_dim),
        (layout.proj_columns, layout.num_heads * layout.head_dim),
    ):
        parts = [held(rank) for rank in range(layout.num_ranks)]
        assert {part.size for part in parts} == {total // layout.num_ranks}
        assert {part.dtype for part in parts} == {np.dtype(np.int64)}
        assert sorted(np.concatenate(parts)) == list(range(total))


@quick
@given(layouts())
def test_rows_and_columns_are_in_the_order_of_stocks_virtual_heads(layout):
    """The layer is stock's: rows in another order would mix queries with keys, or heads with heads."""
    for rank in range(layout.num_ranks):
        rows, columns = slow_parts(layout, rank)
        assert list(layout.qkv_rows(rank)) == rows
        assert list(layout.proj_columns(rank)) == columns


@quick
@given(layouts())
def test_separate_projections_have_the_rows_of_the_fused_one(layout):
    """Hosts that keep query, key and value apart must hold what the fused projection of the same rank holds."""
    g, r, d = layout.num_kv_heads, layout.num_heads // layout.num_kv_heads, layout.head_dim
    blocks = r * (2 if layout.output_gate else 1) + 2
    kind = np.empty(
        (g, blocks, d), dtype=int
    )  # row of the projection that each fused row comes from
    kind[:, :r] = np.arange(g * r * d).reshape(g, r, d)
    kind[:, -2:] = np.arange(g * d).reshape(g, 1, d)
    for rank in range(layout.num_ranks):
        held = layout.qkv_rows(rank)
        block = held // d % blocks
        assert np.array_equal(kind.reshape(-1)[held[block < r]], layout.query_rows(rank))
        for fused in (blocks - 2, blocks - 1):
            assert np.array_equal(kind.reshape(-1)[held[block == fused]], layout.kv_rows(rank))


@quick
@given(layouts())
def test_segments_cut_a_head_and_split_no_rotary_pair(layout):
    """Rotary embedding is applied locally, so both dimensions of a pair must lie in one segment."""
    segments = [layout.segment_dims(j) for j in range(layout.segments)]
    assert {dims.size for dims in segments} == {layout.segment_dim}
    assert sorted(np.concatenate(segments)) == list(range(layout.head_dim))
    for dims in segments:
        held = set(dims.tolist())
        assert {partner(layout, dim) for dim in held} == held


@quick
@given(layouts(), st.integers(0, 2**31))
def test_rotating_commutes_with_cutting(layout, seed):
    """A segment rotated with its columns of the table is the segment of the rotated head: the local pairing
    is the pairing of the whole head."""
    rotated = layout.rotary_dim if layout.rotary != "none" else 0
    interleaved = layout.rotary == "interleaved"
    random = torch.Generator().manual_seed(seed)
    head = torch.randn(3, 1, 1, layout.head_dim, generator=random, dtype=torch.float64)
    table = oracle.rotary_angles(3, rotated, interleaved)
    whole = oracle.rotate(head, table, interleaved)
    for j in range(layout.segments):
        dims, columns = layout.segment_dims(j), layout.rotary_columns(j)
        assert columns.size == rotated // layout.segments
        local = oracle.rotate(head[..., dims], table[..., columns], interleaved)
        torch.testing.assert_close(local, whole[..., dims], rtol=0, atol=1e-14)


@quick
@given(layouts())
def test_segment_pieces_cover_the_head(layout):
    """`join_canonical` rebuilds heads piece by piece: pieces must be adjacent, and divide by m."""
    end = 0
    for start, length in layout.segment_pieces:
        assert start == end
        assert length > 0
        assert length % layout.segments == 0
        end = start + length
    assert end == layout.head_dim


@quick
@given(layouts())
def test_a_member_needs_exactly_the_kv_heads_of_its_dealt_queries(layout):
    """One head too few gives wrong attention; one too many sends bytes for nothing."""
    assume(layout.query_layout == "heads")
    dealt = []
    for rank in range(layout.num_ranks):
        i, j = layout.partition(rank)
        own = list(layout.query_heads(rank))
        assert own == list(layout.dealt_heads(i, j))
        first_kv = i * layout.group_kv_heads
        needed = {head * layout.num_kv_heads // layout.num_heads - first_kv for head in own}
        assert list(layout.kv_heads_needed(j)) == sorted(needed)
        assert needed <= set(range(layout.group_kv_heads))
        dealt += own
    assert dealt == list(range(layout.num_heads))


@quick
@given(layouts())
def test_partitions_are_numbered_with_segments_as_neighbours(layout):
    """Groups, rows and key-value heads all derive from rank = i·m + j."""
    m = layout.segments
    for rank in range(layout.num_ranks):
        i, j = layout.partition(rank)
        assert (i * m + j, 0 <= j < m, 0 <= i < layout.head_groups) == (rank, True, True)
        size = layout.num_kv_heads // layout.head_groups
        assert list(layout.kv_heads(rank)) == list(range(i * size, (i + 1) * size))
        rows = layout.qkv_rows(rank).size
        heads, dims = layout.rank_query_shape
        gates = 2 if layout.output_gate else 1
        assert rows == gates * heads * dims + 2 * len(layout.kv_heads(rank)) * layout.segment_dim
        assert layout.proj_columns(rank).size == heads * dims


@quick
@given(st.lists(st.integers(0, 12), max_size=30))
def test_contiguous_runs_round_trip_and_are_maximal(values):
    """Checkpoints store one box per run: the runs must give the index back, and be as few as possible."""
    index = np.array(values, dtype=np.int64)
    runs = contiguous_runs(index)
    assert [start + k for start, length in runs for k in range(length)] == values
    assert all(length > 0 for _, length in runs)
    for (start, length), (following, _) in itertools.pairwise(runs):
        assert start + length != following


# ------------------------------------------------------------------------- small cases


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("rotary", ["half", "interleaved"])
def test_without_segments_ranks_hold_stock_megatrons_contiguous_parts(
    tensor_parallel, rotary, rotary_dim
):
    """m = 1 is stock: rank t holds rows [g/TP, r+2, d] and columns [h/TP, d], one after the other."""
    layout = HeadLayout(12, 4, 8, tensor_parallel, 1, rotary=rotary, rotary_dim=rotary_dim)
    rows, columns = 4 * (3 + 2) * 8, 12 * 8
    for rank in range(tensor_parallel):
        wanted = np.arange(rows).reshape(tensor_parallel, -1)[rank]
        assert (layout.qkv_rows(rank) == wanted).all()
        wanted = np.arange(columns).reshape(tensor_parallel, -1)[rank]
        assert (layout.proj_columns(rank) == wanted).all()
        assert contiguous_runs(layout.qkv_rows(rank)) == [
            (rank * rows // tensor_parallel, rows // tensor_parallel)
        ]


def test_one_head_group_per_head_is_stocks_split_by_heads():
    """n = h: a rank per head, as stock tensor parallelism cuts multi-head attention."""
    layout = HeadLayout(4, 4, 6, head_groups=4, segments=1)
    assert [list(layout.query_heads(rank)) for rank in range(4)] == [[0], [1], [2], [3]]
    assert (layout.qkv_rows(2) == np.arange(2 * 3 * 6, 3 * 3 * 6)).all()


def test_one_head_on_two_ranks_by_hand():
    """The smallest cut head, written out: halves of both rotary halves, of query, key and value."""
    layout = HeadLayout(1, 1, 8, head_groups=1, segments=2)
    assert layout.segment_pieces == ((0, 4), (4, 4))
    assert list(layout.segment_dims(0)) == [0, 1, 4, 5]
    assert list(layout.segment_dims(1)) == [2, 3, 6, 7]
    assert list(layout.qkv_rows(0)) == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21]
    assert list(layout.proj_columns(1)) == [2, 3, 6, 7]
    assert layout.rank_query_shape == (1, 4)


def test_interleaved_and_partial_segments_by_hand():
    """The three pairings differ in which dimensions a segment takes: contiguous, halves, halves and rest."""
    layout = HeadLayout(1, 1, 8, 1, 2, rotary="interleaved")
    assert list(layout.segment_dims(1)) == [4, 5, 6, 7]
    assert layout.segment_pieces == ((0, 8),)
    layout = HeadLayout(1, 1, 8, 1, 2, rotary_dim=4)
    assert layout.segment_pieces == ((0, 2), (2, 2), (4, 4))
    assert list(layout.segment_dims(0)) == [0, 2, 4, 5]
    assert list(layout.rotary_columns(1)) == [1, 3]
    assert list(HeadLayout(1, 1, 6, 1, 3, rotary="none").segment_dims(1)) == [2, 3]


def test_dealt_query_heads_by_hand():
    """Query layout heads on 2 × 2 ranks: whole query heads, cut keys and values, in slots of two heads."""
    layout = HeadLayout(4, 2, 4, head_groups=2, segments=2, query_layout="heads")
    # Canonical rows: kv head 0 has queries 0-7, key 8-11, value 12-15; kv head 1 starts at 16.
    assert list(layout.qkv_rows(0)) == [0, 1, 2, 3, 8, 10, 12, 14]
    assert list(layout.qkv_rows(1)) == [4, 5, 6, 7, 9, 11, 13, 15]
    assert list(layout.qkv_rows(2)) == [16, 17, 18, 19, 24, 26, 28, 30]
    assert list(layout.proj_columns(3)) == [12, 13, 14, 15]
    assert [list(layout.query_heads(rank)) for rank in range(4)] == [[0], [1], [2], [3]]
    assert [list(layout.kv_heads(rank)) for rank in range(4)] == [[0], [0], [1], [1]]
    assert layout.rank_query_shape == (1, 4)


def test_output_gates_lie_between_queries_and_key_by_hand():
    """Megatron's order with `attention_output_gate`: [queries | gates | key | value] of each key-value head."""
    layout = HeadLayout(2, 1, 2, 1, 2, rotary="none", output_gate=True)
    # Rows: queries 0-3, gates 4-7, key 8-9, value 10-11; segment 1 is the second of each two.
    assert list(layout.qkv_rows(1)) == [1, 3, 5, 7, 9, 11]


def test_without_rotary_no_table_column_applies():
    """A layout that turns nothing has no rotary dimensions, whatever it was told."""
    layout = HeadLayout(2, 2, 8, 1, 2, rotary="none", rotary_dim=8)
    assert layout.rotary_columns(0).size == 0
    assert layout == HeadLayout(2, 2, 8, 1, 2, rotary="none")


# README: query heads, key-value heads, dimensions of a head; ranks, m; copies of a key-value head in stock.
README_MODELS = [
    (28, 4, 128, 8, 2, None),
    (64, 4, 128, 8, 2, 2),
    (32, 2, 256, 8, 4, 4),
    (32, 2, 128, 8, 4, 4),
    (16, 2, 512, 8, 4, 4),
    (32, 4, 512, 8, 2, 2),
    (64, 8, 64, 16, 2, 2),
    (64, 8, 128, 16, 2, 2),
]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "ranks", "m", "copies"), README_MODELS)
def test_models_of_the_readme(heads, kv_heads, dim, ranks, m, copies):
    """README says what stock tensor parallelism does with each model, and the number of segments that fits."""
    layout = HelixConfig(m).layout(heads, kv_heads, dim, ranks)
    assert layout.head_groups == kv_heads
    assert (heads % ranks == 0) == (copies is not None), (
        "stock refuses ranks that do not divide the heads"
    )
    assert copies is None or ranks // kv_heads == copies
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"{heads}, {kv_heads}, {dim}" in readme or f"{heads}, {kv_heads}, 256 or {dim}" in readme
