"""Attention over context-parallel ranks and packed documents equals attention of each sequence on one rank."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

TOLERANCE = 1e-10
S, B, H, D = 16, 2, 4, 8
# name: (key-value heads, mask type, window, mask tensor, softmax)
CASES = {
    "causal": (4, "causal", None, False, "vanilla"),
    "GQA, window": (2, "causal", (5, 0), False, "vanilla"),
    "MQA, all see all": (1, "no_mask", None, False, "vanilla"),
    "padding, window both ways": (2, "padding", (3, 4), True, "vanilla"),
    "padding, causal": (4, "padding_causal", None, True, "vanilla"),
    "learnable sinks": (2, "causal", None, False, "learnable"),
    "sink off by one, window": (2, "causal", (5, 0), False, "off-by-one"),
}
# (length, padded length) of each document.
PACKED = [(5, 8), (8, 8), (1, 8), (16, 16), (10, 16)]


def values(kv_heads: int, batch: int = B, length: int = S) -> list[Tensor]:
    """q, k, v and the output's gradient, of the whole sequence, equal on all ranks."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(length, batch, heads, D, dtype=torch.float64, generator=generator)
        for heads in (H, kv_heads, kv_heads, H)
    ]


def padding_mask(rows: int) -> Tensor:
    """Hides the first keys of one sequence and the last of another: [B, 1, rows, S]."""
    hidden = torch.zeros(B, 1, rows, S, dtype=torch.bool)
    hidden[0, ..., :2], hidden[1, ..., -3:] = True, True
    return hidden


def build(case: str, ranks: int, **settings: Any) -> Any:
    """The core attention on this rank."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from helix_megatron import parallel_state
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.core_attention import HelixCoreAttention

    cpu_runtime.install()
    parallel_state.initialize_model_parallel(1, context_parallel_size=ranks)
    kv_heads, mask_type, window, _, softmax = CASES[case]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H * D,
        num_attention_heads=H,
        num_query_groups=kv_heads,
        context_parallel_size=ranks,
        params_dtype=torch.float64,
        attention_dropout=0.0,
        window_size=window,
        softmax_type=softmax,
        **settings,
    )
    core = HelixCoreAttention(config, 1, AttnMaskType[mask_type], "self")
    if softmax == "learnable":
        with torch.no_grad():
            core.softmax_offset.copy_(torch.linspace(-2, 1, H))
    return core


def attend(case: str, ranks: int) -> list[Tensor]:
    """Output and gradients of q, k, v (and the sinks) on this rank's positions."""
    import torch.distributed as dist

    from helix_megatron.megatron.context_parallel import own_part

    core = build(case, ranks)
    rank = dist.get_rank()
    q, k, v, grad = (own_part(x, 0, rank, ranks) for x in values(CASES[case][0]))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = padding_mask(S // ranks) if CASES[case][3] else None
    output = core(*inputs, mask)
    output.backward(grad.flatten(2))
    sinks = [core.softmax_offset.grad] if CASES[case][4] == "learnable" else []
    return [output, *(x.grad for x in inputs), *sinks]


def expected(case: str) -> list[Tensor]:
    """The same of the whole sequences, by the oracle."""
    kv_heads, mask_type, window, padded, softmax = CASES[case]
    *inputs, grad = values(kv_heads)
    inputs = [x.requires_grad_() for x in inputs]
    sinks = {
        "vanilla": None,
        "off-by-one": torch.zeros(H, dtype=torch.float64),
        "learnable": torch.linspace(-2, 1, H).double().requires_grad_(),
    }[softmax]
    output = oracle.attention(
        *inputs,
        causal="causal" in mask_type,
        window=window,
        hidden=padding_mask(S) if padded else None,
        sinks=sinks,
    )
    output.backward(grad.flatten(2))
    return [output, *(x.grad for x in inputs), *([sinks.grad] if softmax == "learnable" else [])]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_their_part_of_attention(pool, case, ranks):
    """Forward and backward, on the chunks that Megatron's order of positions gives each rank."""
    from helix_megatron.megatron.context_parallel import own_part

    wanted = expected(case)
    found = pool.run(attend, case, ranks, world_size=ranks)
    for rank, parts in enumerate(found):
        for part, whole in zip(parts[:4], wanted[:4], strict=True):
            assert part.abs().max() > 0.01, "all zero"
            torch.testing.assert_close(
                part, own_part(whole, 0, rank, ranks), atol=TOLERANCE, rtol=0
            )
    for sinks in zip(*(parts[4:] for parts in found), strict=True):
        # A sink is a parameter: data parallel reduction sums over the context group.
        torch.testing.assert_close(sum(sinks), wanted[4], atol=TOLERANCE, rtol=0)


def packed_params(padded: bool) -> tuple[Any, list[tuple[int, int]]]:
    """Megatron's description of `PACKED`, and (first row, length) of each document."""
    from itertools import accumulate

    from megatron.core.packed_seq_params import PackedSeqParams

    def borders(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)

    lengths = [length for length, _ in PACKED]
    sizes = [size for _, size in PACKED] if padded else lengths
    starts = borders(sizes).tolist()
    given = {f"cu_seqlens_{side}": borders(lengths) for side in ("q", "kv")}
    if padded:
        given |= {f"cu_seqlens_{side}_padded": borders(sizes) for side in ("q", "kv")}
    largest = max(sizes)
    params = PackedSeqParams(qkv_format="thd", max_seqlen_q=largest, max_seqlen_kv=largest, **given)
    return params, list(zip(starts, lengths, strict=False))


def attend_packed(case: str, ranks: int, padded: bool) -> tuple[list[int], list[Tensor]]:
    """Where this rank's rows lie in the whole row; output and gradients of q, k, v on them."""
    import torch.distributed as dist

    from helix_megatron.megatron.context_parallel import documents_of, own_rows

    core = build(case, ranks)
    params, _ = packed_params(padded)
    total = sum(size if padded else length for length, size in PACKED)
    rows = own_rows(documents_of(params), dist.get_rank(), ranks)
    q, k, v, grad = (x[rows, 0] for x in values(CASES[case][0], 1, total))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    output = core(*inputs, None, packed_seq_params=params)
    output.backward(grad.flatten(1))
    return rows, [output, *(x.grad for x in inputs)]


@pytest.mark.parametrize(
    ("ranks", "padded"), [(1, False), (1, True), (2, True), pytest.param(4, True)]
)
@pytest.mark.parametrize("case", ["GQA, window", "MQA, all see all", "causal", "learnable sinks"])
def test_packed_documents_are_sequences_of_their_own(pool, case, ranks, padded):
    """A row of documents equals each document alone, forward and backward; what is padding gives zeros."""
    kv_heads, mask_type, window, _, softmax = CASES[case]
    _, documents = packed_params(padded)
    total = sum(size if padded else length for length, size in PACKED)
    *inputs, grad = values(kv_heads, 1, total)
    wanted = [torch.zeros(total, H * D).double(), *(torch.zeros_like(x[:, 0]) for x in inputs)]
    for start, length in documents:
        own = slice(start, start + length)
        parts = [x[own].clone().requires_grad_() for x in inputs]
        sinks = torch.linspace(-2, 1, H).double() if softmax == "learnable" else None
        output = oracle.attention(*parts, causal=mask_type == "causal", window=window, sinks=sinks)
        output.backward(grad[own].flatten(2))
        wanted[0][own] = output.detach()[:, 0]
        for whole, part in zip(wanted[1:], parts, strict=True):
            whole[own] = part.grad[:, 0]
    covered: list[int] = []
    for rows, parts in pool.run(attend_packed, case, ranks, padded, world_size=ranks):
        covered += rows
        for part, whole in zip(parts, wanted, strict=True):
            torch.testing.assert_close(part, whole[rows], atol=TOLERANCE, rtol=0)
    assert sorted(covered) == list(range(total)), "every row is on one rank"
