"""Exact attention equals attention on one rank, by every exchange, forward and backward.

And each exchange's cost formula equals the traffic that really ran.
"""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
import torch.distributed as dist

from helix_megatron.core.attention import partitioned_attention
from helix_megatron.core.exchanges import EXACT, AttentionShape, candidates, choose, explain
from helix_megatron.core.layout import HeadLayout
from helix_megatron.core.masks import AttentionMask
from helix_megatron.core.meter import measure
from helix_megatron.errors import HelixError
from helix_megatron.hardware import CPU, GPU


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention: (h, g, d) on n groups of m ranks."""

    heads: int
    kv_heads: int
    dim: int
    groups: int
    segments: int
    batch: int = 4
    length: int = 16
    cached: int = 0  # keys before the first query, as in decoding
    causal: bool = True
    window: tuple[int, int] | None = None
    padding: bool = False
    rotary: str = "half"
    rotary_dim: int | None = None
    softcap: float | None = None

    def layout(self, query_layout: str) -> HeadLayout:
        return HeadLayout(
            self.heads,
            self.kv_heads,
            self.dim,
            self.groups,
            self.segments,
            query_layout=query_layout,
            rotary=self.rotary,
            rotary_dim=self.rotary_dim,
        )


CASES = {
    "MHA 2x2": Case(4, 4, 8, 2, 2),
    "MHA 1 head on 4": Case(1, 1, 16, 1, 4),
    "MQA 1x4": Case(8, 1, 16, 1, 4),
    "GQA 2x2": Case(8, 2, 8, 2, 2),
    "GQA uneven share": Case(12, 4, 8, 2, 4, length=8),
    "GQA straddling": Case(6, 2, 12, 1, 3, batch=3, length=12),
    "group needs part of its kv heads": Case(8, 8, 8, 2, 2),
    "window": Case(4, 2, 8, 2, 2, window=(5, 0)),
    "two-sided window, not causal": Case(4, 2, 8, 2, 2, causal=False, window=(3, 2)),
    "padding": Case(4, 2, 8, 2, 2, padding=True),
    "padding, not causal": Case(4, 2, 8, 2, 2, causal=False, padding=True),
    "cached keys": Case(4, 2, 8, 2, 2, cached=9),
    "one query": Case(4, 2, 8, 2, 2, length=1, cached=9),
    "partial rotary": Case(4, 2, 16, 2, 2, rotary_dim=8),
    "odd thirds of partial rotary": Case(3, 1, 18, 1, 3, batch=3, length=6, rotary_dim=12),
    "soft cap": Case(4, 2, 8, 2, 2, window=(5, 0), padding=True, softcap=0.8),
    "8 ranks": Case(8, 2, 16, 2, 4),
    "16 ranks": Case(8, 4, 16, 4, 4),
}


def fitting(case: Case) -> list[tuple[str, str]]:
    """(exchange, query layout) of all that fit a case."""
    found = []
    for exchange in EXACT:
        try:
            shape = shape_of(case, exchange.query_layout)
        except HelixError:
            continue
        if not exchange.supports(shape):
            found.append((exchange.name, exchange.query_layout))
    return found


def shape_of(case: Case, query_layout: str, element_size: int = 8) -> AttentionShape:
    return AttentionShape(
        layout=case.layout(query_layout),
        batch=case.batch,
        query_length=case.length,
        key_length=case.length + case.cached,
        element_size=element_size,
        causal=case.causal,
        window=case.window,
    )


def hidden_of(case: Case) -> torch.Tensor | None:
    if not case.padding:
        return None
    hidden = torch.zeros(case.batch, 1, 1, case.length + case.cached, dtype=torch.bool)
    hidden[0, ..., -3:] = True
    hidden[1, ..., :2] = True  # under a causal mask the first two queries then see nothing
    return hidden


def full_tensors(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, the same on every rank."""
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    keys = case.length + case.cached
    return [
        draw(case.length, case.batch, case.heads, case.dim),
        draw(keys, case.batch, case.kv_heads, case.dim),
        draw(keys, case.batch, case.kv_heads, case.dim),
        draw(case.length, case.batch, case.heads * case.dim),
    ]


def run_exchanges(case: Case, exchanges: list[tuple[str, str]], dtype: torch.dtype) -> list[dict]:
    """For each (exchange, query layout): this rank's output, gradients and traffic."""
    m = case.segments
    groups = [dist.new_group(list(range(i * m, (i + 1) * m))) for i in range(case.groups)]
    group = groups[dist.get_rank() // m]
    return [run_exchange(case, *exchange, dtype, group) for exchange in exchanges]


def run_exchange(
    case: Case, exchange: str, query_layout: str, dtype: torch.dtype, group: dist.ProcessGroup
) -> dict:
    layout, rank = case.layout(query_layout), dist.get_rank()
    q, k, v, grad = full_tensors(case, dtype)
    dims = layout.segment_dims(layout.partition(rank)[1])
    q = q[:, :, list(layout.query_heads(rank))]
    q = q if query_layout == "heads" else q[..., dims]
    k, v = (t[:, :, list(layout.kv_heads(rank))][..., dims] for t in (k, v))
    local = [t.clone().requires_grad_() for t in (q, k, v)]
    with measure() as meter:
        output = partitioned_attention(
            *local,
            layout=layout,
            group=group,
            mask=AttentionMask(case.causal, case.window, hidden_of(case)),
            exchange=exchange,
            softcap=case.softcap,
        )
        forward_bytes, forward_calls = meter.bytes("exchange"), meter.calls("exchange")
        output.backward(grad[..., layout.proj_columns(rank)])
    return {
        "output": output.detach(),
        "grads": [t.grad for t in local],
        "forward_bytes": forward_bytes,
        "forward_calls": forward_calls,
        "all_bytes": meter.bytes(),
    }


def reference(
    case: Case, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    q, k, v, grad = full_tensors(case, dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    output = oracle.attention(
        *leaves,
        causal=case.causal,
        window=case.window,
        hidden=hidden_of(case),
        softcap=case.softcap,
    )
    output.backward(grad)
    return output.detach(), [t.grad for t in leaves]


def assemble(
    case: Case, query_layout: str, results: list[dict]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The ranks' parts as the whole output and gradients, each element from exactly one rank."""
    layout = case.layout(query_layout)
    q, k, v, grad = full_tensors(case, results[0]["output"].dtype)
    whole = [torch.full_like(t, float("nan")) for t in (grad, q, k, v)]
    for rank, result in enumerate(results):
        dims = torch.as_tensor(layout.segment_dims(layout.partition(rank)[1]))
        whole[0][..., layout.proj_columns(rank)] = result["output"]
        heads, kv = torch.tensor(layout.query_heads(rank)), torch.tensor(layout.kv_heads(rank))
        if query_layout == "heads":
            whole[1][:, :, heads] = result["grads"][0]
        else:
            whole[1][:, :, heads[:, None], dims] = result["grads"][0]
        for target, part in zip(whole[2:], result["grads"][1:], strict=True):
            target[:, :, kv[:, None], dims] = part
    return whole[0], whole[1:]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_every_exchange_equals_one_rank_in_fp64(pool, name):
    """Exact means exact: output and gradients to 1e-10, and the bytes are those of the formula."""
    case = CASES[name]
    expected, expected_grads = reference(case)
    exchanges = fitting(case)
    assert exchanges, "a case that no exchange fits tests nothing"
    world_size = case.groups * case.segments
    by_rank = pool.run(run_exchanges, case, exchanges, torch.float64, world_size=world_size)
    for (exchange, query_layout), *results in zip(exchanges, *by_rank, strict=True):
        output, grads = assemble(case, query_layout, results)
        errors = [relative_error(output, expected)]
        errors += [relative_error(g, e) for g, e in zip(grads, expected_grads, strict=True)]
        assert max(errors) <= 1e-10, f"{exchange}: {errors}"

        shape = shape_of(case, query_layout)
        chosen = choose(shape, exchange)
        for result in results:
            assert result["forward_bytes"] == chosen.bytes(shape), exchange
            assert result["forward_calls"] == chosen.messages(shape), exchange
            assert result["all_bytes"] == 2 * chosen.bytes(shape), exchange


def test_cases_reach_every_exchange():
    """A renamed or never fitting exchange must not silently drop out of the test above."""
    reached = {name for case in CASES.values() for name, _ in fitting(case)}
    assert reached == {exchange.name for exchange in EXACT}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_one_rank(pool, dtype):
    """FlashAttention's rule: against fp32, at most twice the error of unsharded attention in the same dtype."""
    case = Case(8, 2, 32, 2, 2, length=64)
    exact, exact_grads = reference(case, torch.float32)
    q, k, v, grad = full_tensors(case, dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    unsharded = oracle.attention(*leaves, causal=True)
    unsharded.backward(grad)
    allowed = [relative_error(unsharded.detach(), exact)]
    allowed += [relative_error(t.grad, e) for t, e in zip(leaves, exact_grads, strict=True)]
    exchanges = fitting(case)
    by_rank = pool.run(run_exchanges, case, exchanges, dtype, world_size=4)
    for (exchange, query_layout), *results in zip(exchanges, *by_rank, strict=True):
        output, grads = assemble(case, query_layout, results)
        values = [output, *grads]
        assert all(t.isfinite().all() and t.abs().max() > 0 for t in values)
        errors = [relative_error(t, e) for t, e in zip(values, [exact, *exact_grads], strict=True)]
        assert all(e <= 2 * a for e, a in zip(errors, allowed, strict=True)), (
            exchange,
            errors,
            allowed,
        )


def test_auto_takes_the_cheapest_and_says_why():
    """The choice is by cost, and the explanation shows every rival and each reason."""
    shape = AttentionShape(HeadLayout(64, 8, 128, 8, 2, "heads"), 1, 4096, 4096)
    assert choose(shape).name == "gather-kv"
    cut = AttentionShape(HeadLayout(16, 16, 512, 16, 2), 1, 4096, 4096)
    assert choose(cut).name == "all-to-all-sequence"
    pair = dataclasses.replace(cut, batch=2)
    assert choose(pair).name == "all-to-all-batch"
    ranked = [c for c in candidates(pair, GPU) if c.fits]
    assert ranked == sorted(ranked, key=lambda c: c.seconds)
    text = explain(cut)
    assert "all-to-all-batch     not here: a micro-batch of 1 cannot be dealt to 2 ranks" in text
    assert "<- chosen" in text.split("all-to-all-sequence")[1].splitlines()[0]
    assert all(exchange.name in text for exchange in EXACT)


def test_short_sequences_prefer_reduced_scores():
    """score-reduce is worth having: one query against few keys sends less that way."""
    shape = AttentionShape(HeadLayout(4, 4, 512, 4, 4), 1, 1, 64, element_size=4)
    assert choose(shape, machine=CPU).name == "score-reduce"


def test_an_exchange_that_does_not_fit_is_refused_with_the_reason():
    """Asked for by name, an exchange must not silently become another."""
    shape = AttentionShape(HeadLayout(4, 4, 8, 2, 2), 3, 16, 16)
    with pytest.raises(HelixError) as error:
        choose(shape, "all-to-all-batch")
    assert str(error.value) == (
        "exchange all-to-all-batch does not fit here (all-to-all-batch: a micro-batch of 3 cannot be dealt "
        "to 2 ranks; it must be a multiple of 2). Valid here: gather-qk, score-reduce, all-to-all-heads, "
        'all-to-all-sequence. Try exchange="auto".'
    )
    assert choose(shape, "all-to-all").name.startswith("all-to-all-")
    with pytest.raises(HelixError, match="exchange 'gather' is unknown"):
        choose(shape, "gather")


def run_with_wrong_shapes() -> str:
    layout = HeadLayout(4, 2, 8, 1, 2)
    q, k = torch.zeros(4, 1, 4, 4), torch.zeros(4, 1, 2, 8)
    with pytest.raises(HelixError) as error:
        partitioned_attention(q, k, k, layout=layout, group=dist.group.WORLD)
    return str(error.value)


def test_shapes_that_are_not_the_layouts_are_refused(pool):
    """A wrong shape must not be broadcast into a wrong answer."""
    assert pool.run(run_with_wrong_shapes, world_size=2)[0] == (
        "k has shape (4, 1, 2, 8); this layout needs (4, 1, 2, 4) (sequence, batch, heads, dimensions)."
    )
