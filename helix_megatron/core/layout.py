"""Which rows of `linear_qkv` and columns of `linear_proj` each rank holds.

Letters used in this package:

    h  query heads                  n  head groups (first level)
    g  key-value heads              m  segments of a head (second level)
    r  query heads per kv head      p  = m·n attention ranks = tensor parallel ranks
    d  dimensions of a head         (i, j)  head group i in [0, n), segment j in [0, m)

Tensor parallel rank `i·m + j` is partition (i, j): the segments of a group are neighbours, because they
exchange most. An ordinary checkpoint's *canonical* order is, row-major,

    rows of linear_qkv       [g, r query heads | r output-gate heads | key | value, d]
    columns of linear_proj   [h, d]

`HeadLayout` is the only place that maps canonical indices to ranks. Attention, checkpoints, caches, the
planner and the graph all ask it. It needs neither torch nor a process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from helix_megatron.errors import HelixError, Setting, counted, divisors

QueryLayout = Literal["segments", "heads"]
RotaryStyle = Literal["none", "half", "interleaved"]


@dataclass(frozen=True)
class HeadLayout:
    """The m × n partition of one attention layer.

    Args:
        num_heads: query heads h.
        num_kv_heads: key-value heads g; h for multi-head, 1 for multi-query attention.
        head_dim: dimensions d of a head.
        head_groups: n, the first level. Divides g, so that no key-value head is split among groups.
        segments: m, the second level. Divides d.
        query_layout: `segments` cuts query heads like key-value heads; `heads` deals a group's query heads
            whole to its m ranks (needs h divisible by m·n) and cuts keys and values only.
        rotary: how rotary embedding pairs dimensions: `half` pairs k with k + rotary_dim/2 (GPT-NeoX,
            Llama, Megatron's default), `interleaved` pairs 2k with 2k+1 (GPT-J), `none` pairs nothing.
        rotary_dim: how many leading dimensions of a head are rotated; all of them when None, 0 with rotary
            `none`.
        output_gate: linear_qkv also holds one gate head per query head (Megatron's
            `attention_output_gate`).

    Raises:
        HelixError: the numbers do not fit; the text says which would.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_groups: int = 1
    segments: int = 1
    query_layout: QueryLayout = "segments"
    rotary: RotaryStyle = "half"
    rotary_dim: int | None = None
    output_gate: bool = False

    def __post_init__(self) -> None:
        if self.rotary == "none":
            object.__setattr__(self, "rotary_dim", 0)
        elif self.rotary_dim is None:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        self._check()

    # ------------------------------------------------------------------ sizes

    @property
    def num_ranks(self) -> int:
        """p = m·n."""
        return self.head_groups * self.segments

    @property
    def segment_dim(self) -> int:
        """d/m, the dimensions of a segment."""
        return self.head_dim // self.segments

    @property
    def queries_per_kv_head(self) -> int:
        """r = h/g."""
        return self.num_heads // self.num_kv_heads

    @property
    def group_heads(self) -> int:
        """h/n, query heads of a head group."""
        return self.num_heads // self.head_groups

    @property
    def group_kv_heads(self) -> int:
        """g/n, key-value heads of a head group."""
        return self.num_kv_heads // self.head_groups

    @property
    def rank_query_shape(self) -> tuple[int, int]:
        """(heads, dimensions) of one rank's queries: (h/n, d/m) for `segments`, (h/p, d) for `heads`."""
        if self.query_layout == "heads":
            return self.num_heads // self.num_ranks, self.head_dim
        return self.group_heads, self.segment_dim

    def partition(self, rank: int) -> tuple[int, int]:
        """(i, j): head group and segment of tensor parallel rank `rank`."""
        if not 0 <= rank < self.num_ranks:
            raise HelixError(
                f"rank {rank} is not in this layout. Valid ranks: 0 to {self.num_ranks - 1}."
            )
        return divmod(rank, self.segments)

    # ---------------------------------------------------------------- segments

    @cached_property
    def segment_pieces(self) -> tuple[tuple[int, int], ...]:
        """(start, length) of the parts of a head of which every segment takes one m-th, in order.

        Chunk j of each piece makes segment j. Two halves of the rotated dimensions keep a rotary pair
        together; the un-rotated rest is a piece of its own.
        """
        assert self.rotary_dim is not None
        rotated = self.rotary_dim
        pieces = [(0, rotated), (rotated, self.head_dim - rotated)]
        if self.rotary == "half":
            pieces[:1] = [(0, rotated // 2), (rotated // 2, rotated // 2)]
        return tuple((start, length) for start, length in pieces if length)

    def segment_dims(self, segment: int) -> np.ndarray:
        """Dimensions of a head, int64 [d/m], that segment j holds, in the order in which it holds them."""
        return np.concatenate(
            [
                np.arange(
                    start + segment * (length // self.segments),
                    start + (segment + 1) * (length // self.segments),
                )
                for start, length in self.segment_pieces
            ]
        )

    def rotary_columns(self, segment: int) -> np.ndarray:
        """Columns of a head's rotary table [.., rotary_dim] that apply to segment j, in its own order."""
        assert self.rotary_dim is not None
        dims = self.segment_dims(segment)
        return dims[dims < self.rotary_dim]

    # ------------------------------------------------------------- heads of ranks

    def query_heads(self, rank: int) -> range:
        """Query heads of which `rank` holds a part: its group's (`segments`) or its own (`heads`)."""
        i, j = self.partition(rank)
        if self.query_layout == "heads":
            return self.dealt_heads(i, j)
        return range(i * self.group_heads, (i + 1) * self.group_heads)

    def dealt_heads(self, group: int, member: int) -> range:
        """Query heads of member j when group i deals its heads whole, in contiguous blocks."""
        per_rank = self.group_heads // self.segments
        first = group * self.group_heads + member * per_rank
        return range(first, first + per_rank)

    def kv_heads(self, rank: int) -> range:
        """Key-value heads of which `rank` holds a segment."""
        i, _ = self.partition(rank)
        return range(i * self.group_kv_heads, (i + 1) * self.group_kv_heads)

    def rank_lines(self) -> list[str]:
        """For people: a line for each rank, with the heads that it holds."""
        lines = []
        for rank in range(self.num_ranks):
            queries, keys, (_, j) = (
                self.query_heads(rank),
                self.kv_heads(rank),
                self.partition(rank),
            )
            part = "whole" if self.query_layout == "heads" else f"segment {j}"
            lines.append(
                f"  tensor parallel rank {rank}: query heads {queries.start}-{queries.stop - 1} ({part}), "
                f"segment {j} of key-value heads {keys.start}-{keys.stop - 1}"
            )
        return lines

    def kv_heads_needed(self, member: int) -> range:
        """Key-value heads, counted inside the group, that member j's dealt query heads attend to."""
        heads = self.dealt_heads(0, member)
        r = self.queries_per_kv_head
        return range(heads.start // r, (heads.stop - 1) // r + 1)

    # ---------------------------------------------------- canonical indices of ranks

    def qkv_rows(self, rank: int) -> np.ndarray:
        """Canonical rows of `linear_qkv`, int64 [rows/p], in the order in which `rank` holds them.

        The order is stock Megatron's for h·m query and g·m key-value heads of d/m dimensions:
        [g/n, r | r gates | key | value, d/m]. With `query_layout="heads"` the query slots, read in order,
        hold this rank's whole heads.
        """
        i, j = self.partition(rank)
        r = self.queries_per_kv_head
        blocks = r * (2 if self.output_gate else 1) + 2
        rows = np.arange(self.num_kv_heads * blocks * self.head_dim)
        rows_GBD = rows.reshape(self.num_kv_heads, blocks, self.head_dim)
        dims = self.segment_dims(j)
        own_kv = slice(i * self.group_kv_heads, (i + 1) * self.group_kv_heads)

        parts = [
            self._query_slots(rows_GBD[:, start : start + r], rank)
            for start in ((0, r) if self.output_gate else (0,))
        ]
        parts.append(rows_GBD[own_kv, -2:][..., dims].reshape(self.group_kv_heads, -1))
        return np.concatenate(parts, axis=1).reshape(-1)

    def proj_columns(self, rank: int) -> np.ndarray:
        """Canonical columns of `linear_proj`, int64 [columns/p], in the order in which `rank` holds them."""
        columns_HD = np.arange(self.num_heads * self.head_dim).reshape(self.num_heads, -1)
        columns_GRD = columns_HD.reshape(self.num_kv_heads, self.queries_per_kv_head, self.head_dim)
        return self._query_slots(columns_GRD, rank).reshape(-1)

    def query_rows(self, rank: int) -> np.ndarray:
        """Rows of a separate query projection [h, d], int64 [h·d/p], in the order in which `rank` holds them.

        They are the heads and dimensions of `proj_columns`: a rank projects back what it has queried for.
        """
        return self.proj_columns(rank)

    def kv_rows(self, rank: int) -> np.ndarray:
        """Rows of a separate key or value projection [g, d], int64 [g·d/p], in the order of `rank`."""
        _, j = self.partition(rank)
        rows_GD = np.arange(self.num_kv_heads * self.head_dim).reshape(self.num_kv_heads, -1)
        return rows_GD[np.asarray(self.kv_heads(rank))][:, self.segment_dims(j)].reshape(-1)

    def _query_slots(self, index_GRD: np.ndarray, rank: int) -> np.ndarray:
        """This rank's part of a per-query-head index [g, r, d], as [g/n, r·d/m]."""
        _, j = self.partition(rank)
        heads = np.asarray(self.query_heads(rank))
        index_HD = index_GRD.reshape(self.num_heads, self.head_dim)[heads]
        if self.query_layout == "segments":
            index_HD = index_HD[:, self.segment_dims(j)]
        return index_HD.reshape(self.group_kv_heads, -1)

    # ------------------------------------------------------------------- checks

    def _check(self) -> None:
        h, g, d = self.num_heads, self.num_kv_heads, self.head_dim
        n, m = self.head_groups, self.segments
        for name in ("num_heads", "num_kv_heads", "head_dim", "head_groups", "segments"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise HelixError(
                    f"{name} is {value!r}. It must be a whole number of at least 1.",
                    setting=name,
                    value=value,
                )
        for name, called, valid in (
            ("query_layout", "query layout", get_args(QueryLayout)),
            ("rotary", "rotary style", get_args(RotaryStyle)),
        ):
            value = getattr(self, name)
            if value not in valid:
                raise HelixError(
                    f"{called} {value!r} is unknown.", setting=name, value=value, valid=valid
                )
        self._check_rotary_dim()
        if h % g:
            raise HelixError(
                f"{counted(h, 'query head')} cannot share {counted(g, 'key-value head')} evenly.",
                setting="num_kv_heads",
                value=g,
                valid=divisors(h),
                valid_name="numbers of key-value heads",
            )
        if g % n:
            heads = counted(h, "head") if g == h or h % n else counted(g, "key-value head")
            why = ": a key-value head would be split among groups" if not h % n else ""
            raise HelixError(
                f"{heads} cannot form {counted(n, 'head group')}{why}.",
                setting="head_groups",
                value=n,
                valid=divisors(g),
                valid_name="numbers of groups",
                remedy=self._other_segments(),
            )
        if m not in self._valid_segments():
            rest = d - 2 * self._rotary_pairs
            others = f" and {rest} others" if rest else ""
            raise HelixError(
                f"a head of {d} dimensions cannot be cut into {m} equal segments."
                if d % m
                else f"{m} segments of a head of {d} dimensions would split a rotary pair: "
                f"{self._rotary_pairs} pairs{others} cannot be dealt evenly.",
                setting="segments",
                value=m,
                valid=self._valid_segments(),
                valid_name="numbers of segments",
            )
        if self.query_layout == "heads" and self.group_heads % m:
            raise HelixError(
                f"query layout heads deals the {self.group_heads} query heads of a head group whole to "
                f"{m} ranks, which needs the number of query heads ({h}) to be divisible by m·n = {n * m}.",
                setting="query_layout",
                value="heads",
                remedy=("Try ", Setting("query_layout", "segments"), "."),
            )

    def _check_rotary_dim(self) -> None:
        d, rotated = self.head_dim, self.rotary_dim
        if self.rotary == "none":
            return
        if not isinstance(rotated, int) or not 0 < rotated <= d or rotated % 2:
            raise HelixError(
                f"rotary embedding cannot rotate {rotated!r} of {d} dimensions.",
                setting="rotary_dim",
                value=rotated,
                valid=(f"an even number up to {d}", "or rotary style none"),
            )

    @property
    def _rotary_pairs(self) -> int:
        assert self.rotary_dim is not None
        return self.rotary_dim // 2

    def _valid_segments(self) -> list[int]:
        """What divides the head and its rotary pairs, and so the dimensions that are not rotated."""
        return [m for m in divisors(self.head_dim) if self._rotary_pairs % m == 0]

    def _other_segments(self) -> tuple[str | Setting, ...]:
        """Advice: the number of segments that would fit the same number of ranks, largest n first."""
        ranks = self.num_ranks
        must_cut = self.query_layout == "heads" and self.num_heads % ranks
        layout = (" ", Setting("query_layout", "segments")) if must_cut else ()
        for n in reversed(divisors(self.num_kv_heads)):
            if ranks % n == 0 and ranks // n in self._valid_segments():
                size = Setting("intra_head_parallel_size", ranks // n)
                return (f"With {ranks} ranks try ", size, *layout, ".")
        return (f"No number of segments makes {ranks} ranks fit; change the tensor parallel size.",)


def rotary_of(head_dim: int, percent: float, interleaved: bool) -> tuple[RotaryStyle, int]:
    """(rotary, rotary_dim) of a layout from Megatron's settings; `percent` is 0 without rotary embedding."""
    rotated = int(head_dim * percent)
    if rotated == 0:
        return "none", 0
    return ("interleaved" if interleaved else "half"), rotated


def contiguous_runs(index: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of the maximal ascending runs of an index, in its order: [4, 5, 0] → (4, 2), (0, 1)."""
    if index.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    return [(int(run[0]), len(run)) for run in np.split(index, breaks)]
