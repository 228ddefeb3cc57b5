"""What each rank does for `bench attention`: check that the layers are equal, time them, count their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron import parallel_state
from helix_megatron.bench.attention_case import HELIX, STOCK, STOCK_SDPA, Case, Measured
from helix_megatron.bench.attention_layers import DTYPES, build_layers, canonical_part, rotary_table
from helix_megatron.bench.timing import interleaved
from helix_megatron.core.meter import EXCHANGE, Meter, measure
from helix_megatron.errors import HelixError
from helix_megatron.megatron import cpu_runtime
from helix_megatron.megatron.random import seed_model_parallel

LIMITS = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference from stock (Frobenius norms) that rounding explains."""


def measure_case(case: Case, repeats: int) -> Measured:
    """To be called on the ranks of a world that is exactly the case's.

    Raises:
        HelixError: a layer differs from stock. Nothing has been timed then.
    """
    cpu_runtime.install()
    segments = case.helix.intra_head_parallel_size
    parallel_state.initialize_model_parallel(case.ranks, intra_head_parallel_size=segments)
    try:
        seed_model_parallel(1)
        layers = build_layers(case, dist.get_rank())
        errors = check_equal(layers, case)
        x, grad = inputs(case)
        rotary = rotary_table(case)
        steps = {n: partial(step, layer, x, grad, rotary) for n, layer in layers.items()}
        samples = interleaved(steps, repeats)
        attention_bytes, all_bytes = {}, {}
        for name, run in steps.items():
            with measure() as meter:
                run()
            attention_bytes[name] = _without_tensor_parallelism(meter)
            all_bytes[name] = meter.bytes()
        return Measured(errors, samples, attention_bytes, all_bytes)
    finally:
        parallel_state.destroy_model_parallel()
        cpu_runtime.uninstall()


def step(layer: Any, x: Tensor, grad: Tensor, rotary: Tensor) -> dict[str, Tensor]:
    """Forward and backward: `output` and the gradients of the input and of both weights."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    output, _ = layer(x, None, rotary_pos_emb=rotary)
    output.backward(grad)
    return {
        "output": output.detach(),
        "input gradient": _gradient(x),
        "linear_qkv gradient": layer.linear_qkv.weight.grad,
        "linear_proj gradient": layer.linear_proj.weight.grad,
    }


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output, [S, B, hidden], the same on every rank."""
    random = torch.Generator().manual_seed(2)
    shape = (2, case.sequence_length, case.micro_batch_size, case.hidden_size)
    x, grad = torch.randn(*shape, generator=random).to(
        torch.cuda.current_device(), DTYPES[case.dtype]
    )
    return x, grad


def check_equal(layers: Mapping[str, Any], case: Case) -> dict[str, float]:
    """The largest relative difference from stock of each layer that is meant to equal it.

    Raises:
        HelixError: one exceeds what rounding explains, on any rank.
    """
    x, grad = inputs(case)
    rank, limit = dist.get_rank(), LIMITS[case.dtype]
    rows, columns = canonical_part(case, rank, stock=False)
    rotary = rotary_table(case)
    stock = step(layers[STOCK], x, grad, rotary)
    qkv, proj = _gather(stock["linear_qkv gradient"]), _gather(stock["linear_proj gradient"])
    wanted_of_helix = stock | {
        "linear_qkv gradient": torch.cat(qkv)[rows],
        "linear_proj gradient": torch.cat(proj, dim=1)[:, columns],
    }
    largest = {}
    for name, wanted in ((STOCK_SDPA, stock), (HELIX, wanted_of_helix)):
        got = step(layers[name], x, grad, rotary)
        errors = x.new_tensor(
            [_difference(got[key], wanted[key]) for key in wanted], dtype=torch.float32
        )
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


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


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
