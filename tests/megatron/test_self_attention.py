"""The replacement layer equals ordinary attention: output, input gradient, every weight gradient, in fp64."""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist

from helix_megatron.config import HelixConfig

HIDDEN = 24


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention layer, its partition, and what else it has."""

    heads: int
    kv_heads: int
    dim: int
    tensor_parallel: int
    segments: int
    attention: str = "exact"
    exchange: str = "auto"
    query_layout: str = "auto"
    kernel: str = "auto"
    engine: bool = False  # with the fake of Transformer Engine's core attention
    softmax: str = "vanilla"
    attention_bias: bool = False
    norm: str | None = None
    zero_centered: bool = False
    bias: bool = False
    gate: bool = False
    rotary: str | None = "half"
    rotary_percent: float = 1.0
    window: tuple[int, int] | None = None
    full_every: int | None = None  # layers of which one has no window
    number: int = 1  # of the layer, counted from 1
    padding: bool = False
    scale: float | None = None
    softcap: float | None = None
    sequence_parallel: bool = False
    recompute: bool = False
    batch: int = 4
    length: int = 8


LAYERS = {
    "MHA 2x2": Layer(4, 4, 8, 4, 2),
    "MHA, 2 heads on 4 ranks": Layer(2, 2, 8, 4, 2),
    "1 head on 4 ranks": Layer(1, 1, 16, 4, 4),
    "MQA heads": Layer(8, 1, 16, 4, 4),
    "MQA segments": Layer(8, 1, 16, 4, 4, query_layout="segments"),
    "GQA heads": Layer(8, 2, 8, 4, 2),
    "GQA gather-qk": Layer(4, 2, 8, 4, 2, exchange="gather-qk"),
    "GQA score-reduce": Layer(4, 2, 8, 4, 2, exchange="score-reduce"),
    "GQA all-to-all-batch": Layer(4, 2, 8, 4, 2, exchange="all-to-all-batch"),
    "GQA all-to-all-sequence": Layer(4, 2, 8, 4, 2, exchange="all-to-all-sequence"),
    "GQA all-to-all-heads": Layer(4, 2, 8, 4, 2, exchange="all-to-all-heads"),
    "8 ranks": Layer(4, 2, 16, 8, 4, bias=True),
    "16 ranks": Layer(8, 4, 16, 16, 4, length=16),
    "16 ranks, 2 heads": Layer(2, 2, 16, 16, 8, length=16),
    "interleaved": Layer(4, 2, 8, 4, 2, rotary="interleaved"),
    "interleaved, heads": Layer(8, 1, 16, 4, 4, rotary="interleaved"),
    "partial": Layer(2, 2, 16, 4, 2, rotary_percent=0.5),
    "partial, heads": Layer(8, 1, 16, 4, 4, rotary_percent=0.5),
    "partial interleaved": Layer(2, 2, 16, 4, 2, rotary="interleaved", rotary_percent=0.5),
    "no rotary, odd segments": Layer(2, 2, 6, 4, 2, rotary=None),
    "LayerNorm": Layer(2, 2, 8, 4, 2, norm="LayerNorm"),
    "RMSNorm": Layer(2, 2, 8, 4, 2, norm="RMSNorm"),
    "L2Norm": Layer(2, 2, 8, 4, 2, norm="L2Norm"),
    "LayerNorm, heads": Layer(8, 1, 16, 4, 4, norm="LayerNorm"),
    "RMSNorm, heads, zero-centred": Layer(8, 1, 16, 4, 4, norm="RMSNorm", zero_centered=True),
    "biases": Layer(2, 2, 8, 4, 2, bias=True),
    "output gate": Layer(2, 2, 8, 4, 2, gate=True, bias=True),
    "output gate, heads": Layer(8, 2, 8, 4, 2, gate=True),
    "window": Layer(2, 2, 8, 4, 2, window=(3, 0)),
    "window, heads": Layer(8, 2, 8, 4, 2, window=(3, 0)),
    "windows alternate, first layer": Layer(8, 2, 8, 4, 2, window=(3, 0), full_every=2),
    "windows alternate, second layer, stock core": Layer(
        8, 2, 8, 4, 2, window=(3, 0), full_every=2, number=2, kernel="host"
    ),
    "windows alternate, second layer, cut queries": Layer(
        2, 2, 8, 4, 2, window=(3, 0), full_every=2, number=2
    ),
    "padding": Layer(2, 2, 8, 4, 2, padding=True),
    "padding, heads": Layer(8, 2, 8, 4, 2, padding=True),
    "softmax scale": Layer(2, 2, 8, 4, 2, scale=0.2),
    "soft cap": Layer(8, 2, 8, 4, 2, softcap=0.4, engine=True, recompute=True),
    "soft cap, queries cut": Layer(
        8, 2, 8, 4, 2, softcap=0.4, query_layout="segments", window=(3, 0), padding=True
    ),
    "sequence parallel": Layer(2, 2, 8, 4, 2, sequence_parallel=True, norm="RMSNorm"),
    "recompute": Layer(2, 2, 8, 4, 2, recompute=True),
    "MHA, stock core": Layer(8, 8, 8, 4, 2, kernel="host"),
    "MQA, stock core": Layer(8, 1, 16, 4, 4, kernel="host", norm="LayerNorm", bias=True),
    "GQA, stock core": Layer(8, 2, 8, 4, 2, kernel="host", norm="RMSNorm", sequence_parallel=True),
    "straddling, stock core": Layer(6, 2, 12, 3, 3, kernel="host", length=9, recompute=True),
    "more of its own, stock core": Layer(8, 8, 8, 4, 2, kernel="host", gate=True, window=(3, 0)),
    "interleaved, stock core": Layer(8, 1, 16, 4, 4, kernel="host", rotary="interleaved"),
    "partial, stock core": Layer(
        8, 2, 16, 4, 2, kernel="host", rotary_percent=0.5, scale=0.2, padding=True
    ),
    "all-to-all-batch, stock core": Layer(
        4, 2, 8, 4, 2, kernel="host", exchange="all-to-all-batch", norm="RMSNorm", window=(3, 0)
    ),
    "all-to-all-heads, stock core": Layer(
        8, 2, 8, 4, 2, kernel="host", exchange="all-to-all-heads", recompute=True, gate=True
    ),
    "padding, all-to-all-batch, stock core": Layer(
        2, 2, 8, 4, 2, kernel="host", exchange="all-to-all", padding=True
    ),
    "8 ranks, stock core": Layer(16, 4, 16, 8, 2, kernel="host", norm="LayerNorm"),
    "learnable sinks, stock core": Layer(8, 2, 8, 4, 2, softmax="learnable"),
    "off by one, stock core, all-to-all-batch": Layer(
        2, 2, 8, 4, 2, kernel="host", softmax="off-by-one", exchange="all-to-all-batch"
    ),
    "fake engine": Layer(
        8, 2, 8, 4, 2, engine=True, softmax="learnable", attention_bias=True, norm="RMSNorm"
    ),
    "fake engine, MQA, window": Layer(
        8, 1, 16, 4, 4, engine=True, softmax="off-by-one", window=(3, 0), gate=True, bias=True
    ),
    "fake engine, all-to-all-heads": Layer(
        8,
        2,
        8,
        4,
        2,
        engine=True,
        softmax="learnable",
        attention_bias=True,
        exchange="all-to-all-heads",
    ),
    "fake engine, all-to-all-batch": Layer(
        2, 2, 8, 4, 2, engine=True, attention_bias=True, sequence_parallel=True, recompute=True
    ),
    "segment-local": Layer(2, 2, 8, 4, 2, attention="segment-local"),
    "segment-local GQA": Layer(4, 2, 16, 8, 4, attention="segment-local", bias=True),
    "segment-local interleaved": Layer(
        2, 1, 16, 2, 2, attention="segment-local", rotary="interleaved"
    ),
    "segment-local partial": Layer(2, 2, 16, 4, 2, attention="segment-local", rotary_percent=0.5),
    "segment-local RMSNorm": Layer(2, 2, 8, 4, 2, attention="segment-local", norm="RMSNorm"),
}


def model_of(layer: Layer) -> Layer:
    """The ordinary attention that a layer must equal: for segment-local, h·m heads of d/m dimensions."""
    if layer.attention == "exact":
        return layer
    m = layer.segments
    return dataclasses.replace(
        layer,
        attention="exact",
        heads=layer.heads * m,
        kv_heads=layer.kv_heads * m,
        dim=layer.dim // m,
    )


def tensors(layer: Layer) -> dict[str, torch.Tensor]:
    """Input, output gradient and canonical parameters in fp64, the same on every rank."""
    layer = model_of(layer)
    random = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    share = layer.heads // layer.kv_heads
    rows = layer.kv_heads * (share * (2 if layer.gate else 1) + 2) * layer.dim
    values = {
        "x": draw(layer.length, layer.batch, HIDDEN),
        "grad": draw(layer.length, layer.batch, HIDDEN),
        "linear_qkv.weight": draw(rows, HIDDEN),
        "linear_proj.weight": draw(HIDDEN, layer.heads * layer.dim),
    }
    if layer.softmax == "learnable":
        values["core_attention.softmax_offset"] = draw(layer.heads)
    if layer.bias:
        values |= {"linear_qkv.bias": draw(rows), "linear_proj.bias": draw(HIDDEN)}
    for name in ("q_layernorm", "k_layernorm"):
        if layer.norm in ("LayerNorm", "RMSNorm"):
            values[f"{name}.weight"] = draw(layer.dim)
        if layer.norm == "LayerNorm":
            values[f"{name}.bias"] = draw(layer.dim)
    return values


def padding_mask(layer: Layer) -> torch.Tensor | None:
    """bool [B, 1, 1, S], True where hidden."""
    if not layer.padding:
        return None
    mask = torch.zeros(layer.batch, 1, 1, layer.length, dtype=torch.bool)
    mask[0, ..., -2:] = True
    mask[1, ..., -5:] = True
    return mask


def score_bias(layer: Layer) -> torch.Tensor | None:
    """[1, H, S, S] of all heads, the same on every rank."""
    if not layer.attention_bias:
        return None
    random = torch.Generator().manual_seed(3)
    shape = 1, layer.heads, layer.length, layer.length
    return torch.randn(shape, generator=random, dtype=torch.float64)


def rotary_table(layer: Layer, dim: int) -> torch.Tensor | None:
    if layer.rotary is None:
        return None
    return oracle.rotary_angles(
        layer.length, int(dim * layer.rotary_percent), layer.rotary == "interleaved"
    )


def expected(layer: Layer) -> dict[str, torch.Tensor]:
    """What ordinary attention gives: `output`, and the gradient of the input and of each parameter."""
    layer = model_of(layer)
    values = tensors(layer)
    leaves = {n: t.clone().requires_grad_() for n, t in values.items() if n != "grad"}
    share = layer.heads // layer.kv_heads
    blocks = share * (2 if layer.gate else 1) + 2
    qkv = leaves["x"] @ leaves["linear_qkv.weight"].T
    if layer.bias:
        qkv = qkv + leaves["linear_qkv.bias"]
    qkv = qkv.unflatten(-1, (layer.kv_heads, blocks, layer.dim))
    q = qkv[..., :share, :].flatten(2, 3)
    gate = qkv[..., share : 2 * share, :].flatten(2)
    k, v = qkv[..., -2, :], qkv[..., -1, :]
    if layer.norm:
        q, k = (
            oracle.normalize(
                t,
                layer.norm,
                leaves[f"{n}.weight"] + (1 if layer.zero_centered else 0)
                if f"{n}.weight" in leaves
                else None,
                leaves.get(f"{n}.bias"),
                1e-5,
            )
            for t, n in ((q, "q_layernorm"), (k, "k_layernorm"))
        )
    table = rotary_table(layer, layer.dim)
    if table is not None:
        q, k = (oracle.rotate(t, table, layer.rotary == "interleaved") for t in (q, k))
    sinks = leaves.get("core_attention.softmax_offset")
    if layer.softmax == "off-by-one":
        sinks = torch.zeros(layer.heads, dtype=torch.float64)
    context = oracle.attention(
        q,
        k,
        v,
        causal=True,
        window=layer.window if layer.number != layer.full_every else None,
        hidden=padding_mask(layer),
        softcap=layer.softcap,
        scale=layer.scale,
        bias=score_bias(layer),
        sinks=sinks,
    )
    if layer.gate:
        context = context * torch.sigmoid(gate)
    output = context @ leaves["linear_proj.weight"].T
    output.backward(values["grad"])
    return {"output": output.detach()} | {
        n: t.grad for n, t in leaves.items() if t.grad is not None
    }


def build(layer: Layer, **settings: Any) -> Any:
    """The layer on this rank, with its part of the canonical parameters."""
    from fake_te import FakeTEDotProductAttention
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module

    from helix_megatron import parallel_state
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.norms import use_available_norms
    from helix_megatron.megatron.random import seed_model_parallel
    from helix_megatron.megatron.specs import helix_spec
    from helix_megatron.megatron.transformer_config import HelixTransformerConfig

    cpu_runtime.install()
    if not parallel_state.intra_head_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            layer.tensor_parallel,
            intra_head_parallel_size=layer.segments,
            distributed_timeout_minutes=10,
        )
    seed_model_parallel(5)
    config = HelixTransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=layer.heads,
        num_query_groups=layer.kv_heads,
        kv_channels=layer.dim,
        tensor_model_parallel_size=layer.tensor_parallel,
        sequence_parallel=layer.sequence_parallel,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        perform_initialization=False,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        add_bias_linear=layer.bias,
        attention_output_gate=layer.gate,
        rotary_interleaved=layer.rotary == "interleaved",
        rotary_percent=layer.rotary_percent if layer.rotary else 0.0,
        normalization="LayerNorm" if layer.norm == "L2Norm" else layer.norm or "LayerNorm",
        layernorm_zero_centered_gamma=layer.zero_centered,
        qk_layernorm=layer.norm is not None,
        window_size=layer.window,
        window_attn_skip_freq=layer.full_every,
        softmax_type=layer.softmax,
        softmax_scale=layer.scale,
        recompute_granularity="selective" if layer.recompute else None,
        helix=HelixConfig(
            layer.segments, layer.attention, layer.exchange, layer.query_layout, layer.kernel
        ),
        **settings,
    )
    config.attn_logit_softcapping = layer.softcap
    spec = get_gpt_layer_local_spec(
        qk_layernorm=layer.norm is not None,
        qk_l2_norm=layer.norm == "L2Norm",
        normalization=config.normalization,
    )
    if layer.engine:
        spec.submodules.self_attention.submodules.core_attention = FakeTEDotProductAttention
    spec = helix_spec(use_available_norms(spec), config.helix)
    attention = spec.submodules.self_attention
    return build_module(attention, config=config, layer_number=layer.number).train()


def run_layer(layer: Layer, **settings: Any) -> dict[str, Any]:
    """Output and gradients on this rank, with the canonical indices of its rows and columns."""
    from megatron.core import parallel_state as megatron_state

    module, values = build(layer, **settings), tensors(layer)
    rank = megatron_state.get_tensor_model_parallel_rank()
    group = megatron_state.get_tensor_model_parallel_group()
    if layer.attention == "exact":
        rows, columns = module.layout.qkv_rows(rank), module.layout.proj_columns(rank)
    else:  # a stock model with more heads: contiguous parts
        rows, columns = (
            torch.arange(size).chunk(layer.tensor_parallel)[rank].numpy()
            for size in (len(values["linear_qkv.weight"]), values["linear_proj.weight"].size(1))
        )
    parts = {
        "linear_qkv.weight": lambda t: t[rows],
        "linear_qkv.bias": lambda t: t[rows],
        "linear_proj.weight": lambda t: t[:, columns],
        "core_attention.softmax_offset": lambda t: t.chunk(layer.tensor_parallel)[rank],
    }
    for name, parameter in module.named_parameters():
        value = values[name] if name in values else torch.zeros_like(parameter)
        with torch.no_grad():
            parameter.copy_(parts.get(name, lambda t: t)(value))

    x, grad = values["x"], values["grad"]
    if layer.sequence_parallel:
        x, grad = (t.chunk(layer.tensor_parallel)[rank] for t in (x, grad))
    x = x.clone().requires_grad_()
    mask = padding_mask(layer)
    if mask is not None and layer.kernel == "host":
        # Megatron's own attention heeds the mask, and not its type.
        mask = mask | torch.ones(layer.length, layer.length, dtype=torch.bool).triu(1)
    bias = score_bias(layer)
    if bias is not None:  # of the heads that this rank has, or of its group's where they are cut
        i, _ = module.layout.partition(rank)
        whole = module.layout.query_layout == "heads"
        parts_of_bias = layer.tensor_parallel if whole else module.layout.head_groups
        bias = bias.chunk(parts_of_bias, dim=1)[rank if whole else i]
    output, _ = module(x, mask, rotary_pos_emb=rotary_table(layer, layer.dim), attention_bias=bias)
    # As Megatron's schedules do: `backward` itself would leave the mode that stands in for CUDA.
    torch.autograd.Variable._execution_engine.run_backward(
        (output,), (grad,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )

    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    for name, value in grads.items():
        if "layernorm" in name:  # as Megatron's finalize_model_grads does
            dist.all_reduce(value, group=group)
    return {
        "output": output.detach(),
        "x": x.grad,
        "grads": grads,
        "rows": rows,
        "columns": columns,
    }


def assemble(layer: Layer, results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    values = tensors(layer)
    names = results[0]["grads"]
    whole = {name: torch.full_like(values[name], float("nan")) for name in names if name in values}
    for rank, result in enumerate(results):
        for name, target in whole.items():
            part = result["grads"][name]
            if name.startswith("linear_qkv"):
                target[result["rows"]] = part
            elif name == "core_attention.softmax_offset":
                target.chunk(layer.tensor_parallel)[rank].copy_(part)
            elif name == "linear_proj.weight":
                target[:, result["columns"]] = part
            else:
                target.copy_(part)
    for name in ("output", "x"):
        parts = [result[name] for result in results]
        whole[name] = torch.cat(parts) if layer.sequence_parallel else parts[0]
    return whole


def run_layers(layers: dict[str, Layer]) -> dict[str, dict[str, Any] | str]:
    """`run_layer` of each, on the same groups; for one that raises, its traceback."""
    results: dict[str, dict[str, Any] | str] = {}
    for name, layer in layers.items():
        try:
            results[name] = run_layer(layer)
        except Exception:
            results[name] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def results(pool) -> Callable[[str], list[Any]]:
    """What every rank found for a layer; all layers on the same ranks and segments are run together, once."""

    @functools.cache
    def run(ranks: int, segments: int) -> list[dict[str, Any]]:
        alike = {
            name: layer
            for name, layer in LAYERS.items()
            if (layer.tensor_parallel, layer.segments) == (ranks, segments)
        }
        return pool.run(run_layers, alike, world_size=ranks, timeout=600)

    def of_layer(name: str) -> list[Any]:
        layer = LAYERS[name]
        return [found[name] for found in run(layer.tensor_parallel, layer.segments)]

    return of_layer


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full("attention")] * (layer.tensor_parallel > 8))
        for name, layer in LAYERS.items()
    ],
)
def test_layer_equals_ordinary_attention(results, name):
    """A pretrained model gives the same logits and gradients, whatever its attention has."""
    layer = LAYERS[name]
    wanted = expected(layer)
    by_rank = results(name)
    for found in by_rank:
        assert not isinstance(found, str), found
    got = assemble(layer, by_rank)
    assert set(got) == {n for n in wanted if n != "linear_proj.bias"}
    for key, value in got.items():
        error = ((value - wanted[key]).norm() / wanted[key].norm()).item()
        assert error <= 1e-10, f"{key}: relative error {error}"
