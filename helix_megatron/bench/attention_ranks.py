"""What each rank does for `bench attention`: check that the layers are equal, time them, count their bytes.

Stock comes twice: as it is, and with Helix's attention kernel in the place of its own, so that only what
crosses between ranks differs. The fourth layer is Helix with an exchange that costs nothing and gives a wrong
result: how far any exchange could get.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from helix_megatron.bench.attention_case import FREE, HELIX, STOCK, STOCK_SDPA, Case, Measured
from helix_megatron.bench.contest import helix_ranks, layer_settings
from helix_megatron.bench.timing import interleaved
from helix_megatron.core.exchanges.segments import heads_first, sequence_first
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.core.masks import AttentionMask
from helix_megatron.core.meter import EXCHANGE, Meter, measure
from helix_megatron.errors import HelixError
from helix_megatron.megatron.self_attention import WholeHeadsSelfAttention
from helix_megatron.megatron.specs import helix_spec
from helix_megatron.megatron.transformer_config import HelixTransformerConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
    device = torch.cuda.current_device()
    x, grad = torch.randn(*shape, generator=random).to(device, DTYPES[case.dtype])
    frequencies = 1e4 ** (-torch.arange(0, case.head_dim, 2) / case.head_dim)
    angles = torch.outer(torch.arange(case.sequence_length).float(), frequencies)
    return x, grad, torch.cat([angles, angles], dim=-1)[:, None, None].to(device)


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
        wrong = [_difference(got[key], wanted[key]) for key in wanted]
        errors = got["output"].new_tensor(wrong, dtype=torch.float32)
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


# ------------------------------------------------------------------------------ layers


def build_layers(case: Case, rank: int) -> dict[str, Any]:
    """The four self-attention layers by name, with this rank's part of the weights."""
    layers = {name: _build(name, case) for name in (STOCK, STOCK_SDPA, HELIX, FREE)}
    qkv, proj = weights(case)
    for name, layer in layers.items():
        rows, columns = canonical_part(case, rank, stock=name in (STOCK, STOCK_SDPA))
        with torch.no_grad():
            layer.linear_qkv.weight.copy_(qkv[rows])
            layer.linear_proj.weight.copy_(proj[:, columns])
        layer.to(torch.cuda.current_device())
    return layers


def weights(case: Case) -> tuple[Tensor, Tensor]:
    """Whole canonical `linear_qkv` and `linear_proj`, the same on every rank."""
    random = torch.Generator().manual_seed(1)
    hidden = case.hidden_size
    qkv = torch.randn(case.qkv_rows, hidden, generator=random)
    proj = torch.randn(hidden, case.heads * case.head_dim, generator=random)
    return qkv * hidden**-0.5, proj * hidden**-0.5


def canonical_part(case: Case, rank: int, *, stock: bool) -> tuple[Tensor, Tensor]:
    """Canonical rows of `linear_qkv` and columns of `linear_proj` that a rank holds, in its order."""
    if stock:  # contiguous parts
        sizes = (case.qkv_rows, case.heads * case.head_dim)
        rows, columns = (torch.arange(size).chunk(case.ranks)[rank] for size in sizes)
        return rows, columns
    layout = case.layout
    return torch.as_tensor(layout.qkv_rows(rank)), torch.as_tensor(layout.proj_columns(rank))


def _build(name: str, case: Case) -> Any:
    dtype: dict[str, Any] = {"params_dtype": DTYPES[case.dtype], "bf16": case.dtype == "bf16"}
    sizes = (case.heads, case.kv_heads, case.head_dim, case.ranks)
    settings = layer_settings(*sizes, hidden_size=case.hidden_size, **dtype)
    spec = get_gpt_layer_local_spec()
    if name in (HELIX, FREE):
        config = HelixTransformerConfig(**settings, helix=case.helix)
        attention = helix_spec(spec, case.helix).submodules.self_attention
    else:
        config = TransformerConfig(**settings)
        attention = spec.submodules.self_attention
    if name == STOCK_SDPA:
        submodules = dataclasses.replace(attention.submodules, core_attention=SdpaCore)
        attention = dataclasses.replace(attention, submodules=submodules)
    layer = build_module(attention, config=config, layer_number=1).train()
    if name == FREE and case.layout.query_layout == "heads":
        layer.__class__ = FreeGather
    elif name == FREE:
        layer.core_attention = FreeExchangeCore(layer.config, case)
    return layer


class SdpaCore(MegatronModule):
    """Stock's core attention, computed by Helix's kernel."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """[S, B, heads, d] each → [S, B, heads·d]."""
        parts, scale = map(heads_first, (query, key, value)), query.size(-1) ** -0.5
        o_BHSD = sdpa(*parts, mask=AttentionMask(causal=True), scale=scale, dropout=0.0)
        return sequence_first(o_BHSD).flatten(2)


class FreeExchangeCore(SdpaCore):
    """Helix's core attention in which each rank repeats its own segments instead of receiving others."""

    def __init__(self, config: Any, case: Case) -> None:
        super().__init__(config)
        self.head_dim, self.segments = case.head_dim, case.layout.segments

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query [S, B, heads, dimensions], key and value [S, B, g/n, d/m] → [S, B, h·d/p]."""
        q_SBHD = query.reshape(*query.shape[:2], -1, self.head_dim)
        k_SBGD, v_SBGD = (t.repeat(1, 1, 1, self.segments) for t in (key, value))
        return super().forward(q_SBHD, k_SBGD, v_SBGD)


class FreeGather(WholeHeadsSelfAttention):
    """Helix's gather behind the projection, with a rank's own segments in the place of the others'."""

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        query, kv_SBG2C = self._project(hidden_states)
        kv_SBG2D = kv_SBG2C[:, :, : self.num_query_groups_per_partition]
        key, value = kv_SBG2D.repeat(1, 1, 1, 1, self.layout.segments).unbind(3)
        return query, key.contiguous(), value.contiguous()
