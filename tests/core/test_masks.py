"""What a query sees: descriptions against a loop over (query, key) pairs, the kernel against the oracle."""

from __future__ import annotations

import dataclasses
import itertools
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helix_megatron.core.exchanges import AttentionShape
from helix_megatron.core.exchanges.all_to_all_batch import AllToAllBatch
from helix_megatron.core.exchanges.all_to_all_heads import AllToAllHeads
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.core.layout import HeadLayout
from helix_megatron.core.masks import AttentionMask

BATCH, HEADS = 3, 4
CPU = torch.device("cpu")
quick = settings(max_examples=250, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """A mask and the sizes that it is asked about."""

    mask: AttentionMask
    queries: int
    keys: int

    def brute_force(self) -> Tensor:
        """bool [B, H, L, S], one pair at a time."""
        mask = self.mask
        seen = torch.zeros(BATCH, HEADS, self.queries, self.keys, dtype=torch.bool)
        first = self.keys - self.queries if mask.offset is None else mask.offset
        for query in range(self.queries):
            for key in range(self.keys):
                behind = first + query - key  # how far the key lies before the query
                hidden = mask.causal and behind < 0
                if mask.window is not None:
                    left, right = mask.window
                    hidden = hidden or (left >= 0 and behind > left)
                    hidden = hidden or (right >= 0 and -behind > right)
                seen[..., query, key] = not hidden
        return seen if mask.hidden is None else seen & ~mask.hidden

    def visible(self) -> Tensor:
        shape = (BATCH, HEADS, self.queries, self.keys)
        return self.mask.visible(self.queries, self.keys, CPU).broadcast_to(shape)


@st.composite
def cases(draw: st.DrawFn, hidden: bool = True) -> Case:
    """Any mask: causal, windowed on either side, displaced, with patterns of every broadcastable shape."""
    queries, keys = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    side = st.integers(-1, 4)
    pattern = None
    if hidden and draw(st.booleans()):
        full = [BATCH, HEADS, queries, keys]
        shape = [size if draw(st.booleans()) else 1 for size in full]
        while len(shape) > 1 and shape[0] == 1 and draw(st.booleans()):
            del shape[0]  # leading dimensions may be left out altogether
        random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        pattern = torch.rand(shape, generator=random) < 0.4
    mask = AttentionMask(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(side, side)),
        hidden=pattern,
        offset=draw(st.none() | st.integers(-8, 8)),
    )
    return Case(mask, queries, keys)


@quick
@given(cases())
def test_visible_is_what_the_words_say(case):
    """Everything else rests on it: kernels, score-reduce and the slices below."""
    assert case.visible().equal(case.brute_force())


@quick
@given(cases(), st.data())
def test_a_block_of_queries_sees_what_it_saw(case, data):
    """all-to-all-sequence hands blocks of queries, with fewer keys, to the kernel: a key too few or a shifted
    diagonal is wrong attention."""
    start = data.draw(st.integers(0, case.queries - 1))
    stop = data.draw(st.integers(start + 1, case.queries))
    mask, kept = case.mask.block(start, stop, case.queries, case.keys)
    wanted = case.brute_force()[:, :, start:stop]
    assert 0 <= kept.start <= kept.stop <= case.keys
    rows, columns = stop - start, kept.stop - kept.start
    got = mask.visible(rows, columns, CPU).broadcast_to(BATCH, HEADS, rows, columns)
    assert got.equal(wanted[..., kept])
    dropped = wanted.clone()
    dropped[..., kept] = False
    assert not dropped.any(), "keys were cut off that a query sees"
    if case.mask.hidden is None and wanted.any():
        assert wanted[..., kept.start].any(), "the first key is sent and computed for nothing"
        assert wanted[..., kept.stop - 1].any(), "the last key is sent and computed for nothing"


@quick
@given(cases())
def test_parts_of_batch_and_heads_see_what_they_saw(case):
    """all-to-all over the batch and over heads: each rank's part of a pattern must be its own."""
    whole = case.brute_force()
    for exchange, size in ((AllToAllBatch(), BATCH), (AllToAllHeads(), HEADS)):
        dim = exchange.divided
        for member in range(size):
            rank = types.SimpleNamespace(
                layout=types.SimpleNamespace(segments=size), segment=member
            )
            hidden = exchange.own(case.mask.hidden, rank)
            part = dataclasses.replace(case.mask, hidden=hidden)
            wanted = whole.narrow(dim, member, 1)
            got = part.visible(case.queries, case.keys, CPU)
            assert got.broadcast_to(wanted.shape).equal(wanted)
    assert case.visible().equal(whole), "the mask itself was changed"


def small_cases() -> Iterator[Case]:
    """Every combination of sizes, causality and displacement, some with a window or a pattern."""
    for queries, keys, causal, window, masked in itertools.product(
        range(1, 5), range(1, 5), (False, True), (None, (-1, -1), (1, 0)), (False, True)
    ):
        hidden = torch.zeros(keys, dtype=torch.bool) if masked else None
        for offset in (None, *range(-2, 6)):
            yield Case(AttentionMask(causal, window, hidden, offset), queries, keys)


def test_fast_paths_are_taken_exactly_where_they_are_right():
    """hides_nothing drops the mask and is_plain_causal replaces it by torch's: both must agree with
    `visible`. Without window or pattern the converse holds, too, else fused kernels are lost."""
    for case in small_cases():
        mask, queries, keys = case.mask, case.queries, case.keys
        seen = case.brute_force()
        nothing, causal = mask.hides_nothing(queries, keys), mask.is_plain_causal(queries, keys)
        assert not nothing or seen.all(), case
        lower_right = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        assert not causal or seen.equal(lower_right.expand_as(seen)), case
        if mask.window is None and mask.hidden is None:
            assert nothing == bool(seen.all()), case
            assert causal == (mask.causal and mask.offset in (None, keys - queries)), case


@quick
@given(cases(hidden=False))
def test_visible_pairs_of_the_cost_model_are_those_of_the_mask(case):
    """FLOPs, and so the choice of an exchange, count pairs by a formula of their own."""
    mask = AttentionMask(case.mask.causal, case.mask.window)
    shape = AttentionShape(
        HeadLayout(1, 1, 2),
        1,
        case.queries,
        case.keys,
        causal=mask.causal,
        window=mask.window,
    )
    assert shape.visible_pairs == Case(mask, case.queries, case.keys).brute_force()[0, 0].sum()


# ------------------------------------------------------------------------------ kernel


def random_pattern(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4


def padding(keys: int) -> Tensor:
    """[B, 1, 1, S]: the first sequence whole, the second short, the third empty: its queries see no key."""
    hidden = torch.zeros(BATCH, 1, 1, keys, dtype=torch.bool)
    hidden[1, ..., 2:] = True
    hidden[2] = True
    return hidden


KERNEL_CASES = {
    "all": Case(AttentionMask(), 5, 6),
    "causal": Case(AttentionMask(causal=True), 6, 6),
    "cached keys": Case(AttentionMask(causal=True), 3, 7),
    "one query": Case(AttentionMask(causal=True), 1, 7),
    "more queries than keys": Case(AttentionMask(causal=True), 7, 3),
    "window": Case(AttentionMask(causal=True, window=(2, 0)), 6, 6),
    "two-sided window": Case(AttentionMask(window=(2, 1)), 6, 6),
    "window past all keys": Case(AttentionMask(window=(0, 0), offset=4), 4, 6),
    "shifted": Case(AttentionMask(causal=True, offset=1), 4, 6),
    "before all keys": Case(AttentionMask(causal=True, offset=-9), 4, 6),
    "padding": Case(AttentionMask(hidden=padding(6)), 6, 6),
    "causal padding": Case(AttentionMask(causal=True, hidden=padding(6)), 6, 6),
    "pattern": Case(AttentionMask(hidden=random_pattern(BATCH, HEADS, 5, 6)), 5, 6),
    "everything hidden": Case(AttentionMask(hidden=torch.ones(1, 1, 5, 6, dtype=torch.bool)), 5, 6),
}
BLIND = ["more queries than keys", "before all keys", "padding", "everything hidden"]


def kernel_inputs(case: Case, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as kernels take them; values are narrower than queries and keys."""
    random = torch.Generator().manual_seed(5)
    shapes = [
        (BATCH, HEADS, case.queries, 6),
        (BATCH, kv_heads, case.keys, 6),
        (BATCH, kv_heads, case.keys, 4),
    ]
    drawn = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in drawn]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_sdpa_equals_the_oracle(name, kv_heads):
    """Whichever of torch's paths the mask leads to: output and gradients, grouped heads, narrow values. None
    of them may be one of which torch warns that it gives NaN."""
    case = KERNEL_CASES[name]
    inputs = kernel_inputs(case, kv_heads, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = sdpa(*inputs, mask=case.mask, scale=0.3, dropout=0.0)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(6)).double()
    gradients = torch.autograd.grad((output * weight).sum(), inputs)

    wanted = oracle.attention(
        *(t.permute(2, 0, 1, 3) for t in inputs), hidden=~case.brute_force(), scale=0.3
    )
    wanted = wanted.unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3)
    wanted_gradients = torch.autograd.grad((wanted * weight).sum(), inputs)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLIND)
def test_queries_that_see_no_key_give_zeros_and_no_nan(name, dtype):
    """A softmax over nothing is 0/0: one padded sequence would turn all gradients of a step into NaN."""
    case = KERNEL_CASES[name]
    inputs = kernel_inputs(case, 2, dtype)
    output = sdpa(*inputs, mask=case.mask, scale=0.3, dropout=0.0)
    blind = ~case.brute_force().any(-1)
    assert blind.any(), "no query is blind: nothing tested"
    assert output[blind].eq(0).all()
    assert blind.all() or output[~blind].ne(0).all()
    for gradient in torch.autograd.grad(output.float().square().sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "mask", [AttentionMask(), AttentionMask(window=(1, 1))], ids=["all", "window"]
)
def test_sdpa_without_any_key_gives_zeros(mask):
    """A block of queries that lies before all keys gets an empty range of them."""
    q = torch.randn(BATCH, HEADS, 3, 6)
    nothing = torch.randn(BATCH, 2, 0, 6)
    assert sdpa(q, nothing, nothing, mask=mask, scale=1.0, dropout=0.0).eq(0).all()


def test_dropout_and_scale_reach_torch():
    """Both are easily dropped on the way, and nothing else would notice."""
    case = KERNEL_CASES["all"]
    q, k, v = kernel_inputs(case, HEADS, torch.float64)
    ones = torch.ones_like(v)
    torch.manual_seed(0)
    kept = sdpa(q, k, ones, mask=case.mask, scale=0.3, dropout=0.5)
    assert not kept.allclose(torch.ones_like(kept)), "no attention weight was dropped"
    whole = sdpa(q, k, ones, mask=case.mask, scale=0.3, dropout=0.0)
    assert whole.allclose(torch.ones_like(whole))
    flat = sdpa(q, k, v, mask=case.mask, scale=0.0, dropout=0.0)
    assert flat.allclose(v.mean(2, keepdim=True).expand_as(flat))
