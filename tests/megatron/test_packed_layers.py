"""The layer on packed documents equals the same layer on padded rows, in fp64: output and every gradient."""

from __future__ import annotations

import pytest
import torch
from test_context_parallel import PACKED, TOLERANCE, packed_params
from test_self_attention import HIDDEN, Layer, build

LAYERS = {
    "heads": Layer(4, 2, 8, 2, 2, norm="RMSNorm", bias=True),
    "heads, window, partial, gate": Layer(
        4, 1, 16, 2, 2, window=(3, 0), rotary_percent=0.5, gate=True
    ),
    "heads, recompute": Layer(4, 4, 8, 4, 2, recompute=True, rotary="interleaved"),
    "segments, gather-qk": Layer(4, 2, 8, 2, 2, exchange="gather-qk", query_layout="segments"),
    "segments, score-reduce": Layer(4, 2, 8, 2, 2, exchange="score-reduce"),
    "segments, all-to-all-heads": Layer(4, 2, 8, 2, 2, exchange="all-to-all-heads", norm="RMSNorm"),
}


def difference(layer: Layer, padded: bool) -> float:
    """The largest difference on this rank; `padded`: whether the packed row has padding, too."""
    import oracle
    import torch.distributed as dist

    module = build(layer)
    generator = torch.Generator().manual_seed(11 + dist.get_rank())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    generator.manual_seed(3)  # hidden states are those of all ranks
    params, documents = packed_params(padded)
    longest = max(length for _, length in documents)
    x, grad = torch.randn(2, longest, len(documents), HIDDEN, generator=generator).double()
    for row, (_, length) in enumerate(documents):
        grad[length:, row] = 0
    dims = int(layer.dim * layer.rotary_percent)
    table = oracle.rotary_angles(
        max(size for _, size in PACKED), dims, layer.rotary == "interleaved"
    )

    def run(x, grad, **packed):
        module.zero_grad()
        x = x.clone().requires_grad_()
        length = x.size(0) if not packed else table.size(0)
        output = module(x, None, rotary_pos_emb=table[:length], **packed)
        output = output[0] if output[1] is None else sum(output)
        # As Megatron's schedules do: `backward` itself would leave the mode that stands in for CUDA.
        torch.autograd.Variable._execution_engine.run_backward(
            (output,), (grad,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        return (
            output.detach(),
            x.grad,
            [parameter.grad.clone() for parameter in module.parameters()],
        )

    rows = torch.cat([torch.arange(length) + start for start, length in documents])
    total = int((params.cu_seqlens_q if not padded else params.cu_seqlens_q_padded)[-1])
    row, row_grad = torch.zeros(2, total, 1, HIDDEN).double()

    def pack(rectangle):
        parts = [rectangle[:length, row] for row, (_, length) in enumerate(documents)]
        return torch.cat(parts).unsqueeze(1)

    row[rows], row_grad[rows] = pack(x), pack(grad)
    apart, together = run(x, grad), run(row, row_grad, packed_seq_params=params)
    assert apart[0].abs().max() > 0.1
    pairs = [(pack(apart[0]), together[0][rows]), (pack(apart[1]), together[1][rows])]
    pairs += zip(apart[2], together[2], strict=True)
    return max((a - b).abs().max().item() / max(1.0, a.abs().max().item()) for a, b in pairs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_equals_padded(pool, name, padded):
    """Documents one behind the other give what each gives in a row of its own, whatever the exchange."""
    layer = LAYERS[name]
    for found in pool.run(difference, layer, padded, world_size=layer.tensor_parallel):
        assert found <= TOLERANCE
