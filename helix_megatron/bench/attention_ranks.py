"""What each rank does for `bench attention`: check that the layers are equal, time them, count their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.bench.attention_case import HELIX, STOCK, STOCK_SDPA, Case, Measured
from helix_megatron.bench.attention_layers import DTYPES, build_layers, canonical_part
from helix_megatron.bench.contest import helix_ranks
from helix_megatron.bench.timing import interleaved
from helix_megatron.core.meter import EXCHANGE, Meter, measure
from helix_megatron.errors import HelixError

LIMITS = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference from stock (Frobenius norms) that rounding explains."""


def measure_case(case: Case, repeats: int) -> Measured:
    """To be called on the ranks of a world that is exactly the case's.

    Raises:
        HelixError: a layer differs from stock. Nothing has been timed then.
    """
    with helix_ranks(case.ranks, case.helix.intra_head_parallel_size):
        layers = build_layers(case, dist.get_rank())
        errors = check_equal(layers, case)
        steps = {name: partial(step, layer, *inputs(case)) for name, layer in layers.items()}
        samples = interleaved(steps, repeats)
        attention_bytes, all_bytes = {}, {}
        for name, run in steps.items():
            with measure() as meter:
                run()
            attention_bytes[name] = _without_tensor_parallelism(meter)
            all_bytes[name] = meter.bytes()
        return Measured(errors, samples, attention_bytes, all_bytes)


def step(layer: Any, x: Tensor, grad: Tensor, rotary: Tensor) -> dict[str, Tensor]:
    """Forward and backward: `output` and the gradients of the input and of both weights."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    output, _ = layer(x, None, rotary_pos_emb=rotary)
    output.backward(grad)
    assert x.grad is not None
    return {
        "output": output.detach(),
        "input gradient": x.grad,
        "linear_qkv gradient": layer.linear_qkv.weight.grad,
        "linear_proj gradient": layer.linear_proj.weight.grad,
    }


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Input, gradient of the output, both [S, B, hidden], and rotary angles [S, 1, 1, d] as Megatron's
    `RotaryEmbedding` gives them: the same on every rank."""
    random = torch.Generator().manual_seed(2)
    shape = (2, case.sequence_length, case.micro_batch_size, case.hidden_size)
    x, grad = torch.randn(*shape, generator=random).to(DTYPES[case.dtype])
    frequencies = 1e4 ** (-torch.arange(0, case.head_dim, 2) / case.head_dim)
    angles = torch.outer(torch.arange(case.sequence_length).float(), frequencies)
    return x, grad, torch.cat([angles, angles], dim=-1)[:, None, None]


def check_equal(layers: Mapping[str, Any], case: Case) -> dict[str, float]:
    """The largest relative difference from stock of each layer that is meant to equal it.

    Raises:
        HelixError: one exceeds what rounding explains, on any rank.
    """
    limit = LIMITS[case.dtype]
    rows, columns = canonical_part(case, dist.get_rank(), stock=False)
    stock = step(layers[STOCK], *inputs(case))
    qkv, proj = _gather(stock["linear_qkv gradient"]), _gather(stock["linear_proj gradient"])
    wanted_of_helix = stock | {
        "linear_qkv gradient": torch.cat(qkv)[rows],
        "linear_proj gradient": torch.cat(proj, dim=1)[:, columns],
    }
    largest = {}
    for name, wanted in ((STOCK_SDPA, stock), (HELIX, wanted_of_helix)):
        got = step(layers[name], *inputs(case))
        errors = torch.tensor([_difference(got[key], wanted[key]) for key in wanted])
        dist.all_reduce(errors, dist.ReduceOp.MAX)
        largest[name] = errors.max().item()
        for key, error in zip(wanted, errors.tolist(), strict=True):
            if not error <= limit:
                raise HelixError(
                    f"case {case.name}: the {key} of layer {name} differs from stock's by {error:.1e} "
                    f"(relative); rounding in {case.dtype} explains {limit:.0e}. Nothing was timed: the "
                    "time of a wrong layer means nothing. This is a fault of helix_megatron, please report it."
                )
    return largest


def _difference(got: Tensor, wanted: Tensor) -> float:
    """Relative; infinite where the wanted values are nothing to compare with."""
    error = ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
    return error if math.isfinite(error) else math.inf


def _gather(part: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return parts


def _without_tensor_parallelism(meter: Meter) -> int:
    """Bytes of everything but the layer's all-reduces of its output and its input's gradient."""
    own = sum(
        traffic.bytes
        for (purpose, collective), traffic in meter.traffic.items()
        if collective == "all-reduce" and not purpose.startswith(EXCHANGE)
    )
    return meter.bytes() - own
