"""Norms of plain torch in megatron-core's models."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pool import RankPool
from tiny_gpt import Layout, build_chunk, start_megatron, train

from helix_megatron.errors import HelixError
from helix_megatron.megatron import norms
from helix_megatron.megatron.norms import TorchNorm, use_available_norms
from helix_megatron.megatron.optional import Backends

APEX = Backends(adam="apex", norm="apex", transformer_engine=False, flash_attention=False)
TORCH = Backends(adam="torch", norm="torch", transformer_engine=False, flash_attention=False)


def config(**settings: Any) -> Any:
    """The part of TransformerConfig that a norm reads."""
    return SimpleNamespace(
        **{
            "normalization": "LayerNorm",
            "layernorm_zero_centered_gamma": False,
            "persist_layer_norm": False,
            "memory_efficient_layer_norm": False,
            "sequence_parallel": False,
            "params_dtype": torch.float64,
        }
        | settings
    )


def oracle(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """LayerNorm, or RMSNorm without a bias, from their definitions."""
    if bias is None:
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_values(normalization: str, zero_centered: bool) -> None:
    """A stored weight w of a zero-centred norm means 1 + w."""
    norm = TorchNorm(
        config(normalization=normalization, layernorm_zero_centered_gamma=zero_centered),
        hidden_size=6,
        eps=1e-3,
    )
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    ones, zeros = x.new_ones(6), x.new_zeros(6)
    layer_norm = normalization == "LayerNorm"
    torch.testing.assert_close(norm(x), oracle(x, ones, zeros if layer_norm else None))
    assert torch.equal(norm.weight, zeros if zero_centered else ones)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    scale = norm.weight + 1 if zero_centered else norm.weight
    torch.testing.assert_close(norm(x), oracle(x, scale, norm.bias), rtol=1e-10, atol=1e-10)
    assert list(norm.state_dict()) == ["weight", "bias"][: 1 + layer_norm]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_carry_the_mark_of_sequence_parallelism(sequence_parallel: bool) -> None:
    """finalize_model_grads sums the gradients of marked parameters over tensor-parallel ranks."""
    norm = TorchNorm(config(sequence_parallel=sequence_parallel), 4)
    marks = [parameter.sequence_parallel for parameter in norm.parameters()]  # type: ignore[attr-defined]
    assert marks == [sequence_parallel] * 2


def test_an_unknown_normalization_is_refused() -> None:
    """Only two have the parameters that checkpoints expect."""
    with pytest.raises(HelixError) as caught:
        TorchNorm(config(normalization="L2Norm"), 4)
    assert str(caught.value) == (
        "normalization is 'L2Norm'. Valid values without Transformer Engine: LayerNorm, RMSNorm."
    )


@pytest.mark.parametrize("setting", ["persist_layer_norm", "memory_efficient_layer_norm"])
def test_settings_without_effect_warn(setting: str) -> None:
    """They choose among apex's kernels."""
    with pytest.warns(UserWarning, match=f"{setting} has no effect on torch's norms"):
        TorchNorm(config(**{setting: True}), 4)


def norms_in(value: Any) -> set[str]:
    """The names of all norms in a spec."""
    if isinstance(value, type):
        return {value.__name__} if "Norm" in value.__name__ else set()
    if dataclasses.is_dataclass(value):
        return set().union(*(norms_in(getattr(value, f.name)) for f in dataclasses.fields(value)))
    if isinstance(value, list | tuple):
        return set().union(*map(norms_in, value))
    return set()


@pytest.mark.parametrize(
    ("backends", "fused_becomes"), [(TORCH, "TorchNorm"), (APEX, "FusedLayerNorm")]
)
def test_specs_are_copied_with_norms_that_can_be_built(
    monkeypatch: pytest.MonkeyPatch, backends: Backends, fused_becomes: str
) -> None:
    """Layer, block, dense, experts, query and key norms; any `apex` makes stock specs ask for apex."""
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    monkeypatch.setattr(norms, "available_backends", lambda: backends)
    for experts in (None, 2):
        layer = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=True)
        for norm, expected in ((WrappedTorchNorm, "TorchNorm"), (FusedLayerNorm, fused_becomes)):
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm
            block = TransformerBlockSubmodules(layer_specs=[layer, layer], layer_norm=norm)
            for spec in (layer, block):
                before = repr(spec)
                replaced = use_available_norms(spec)
                assert repr(spec) == before
                assert type(replaced) is type(spec)
                assert norms_in(replaced) == {expected}
            assert replaced.layer_specs[0].submodules.mlp == layer.submodules.mlp


def with_rms_norms(**others: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    return TransformerConfig(
        **sizes, use_cpu_initialization=True, normalization="RMSNorm", **others
    )


def norms_of_a_model(layout: Layout) -> list[str]:
    """The kinds of norm in a built model."""
    start_megatron(layout)
    settings = with_rms_norms(
        tensor_model_parallel_size=layout.tp, sequence_parallel=True, qk_layernorm=True
    )
    model = build_chunk(settings, None)
    return [type(module).__name__ for module in model.modules() if "Norm" in str(type(module))]


def test_a_model_is_built_of_torch_norms_only(pool: RankPool) -> None:
    """Stock's torch norm raises with sequence parallelism; the final norm is easy to forget."""
    assert pool.run(norms_of_a_model, Layout(2, tp=2), world_size=2) == [["TorchNorm"] * 5] * 2


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_sequence_parallel_training_is_the_same(pool: RankPool, normalization: str) -> None:
    """Each rank normalises a part of the tokens: the norms' gradients must be summed."""
    settings = {"normalization": normalization, "qk_layernorm": True}
    (reference,) = pool.run(train, Layout(config=settings), world_size=1)
    layout = Layout(2, tp=2, config=settings | {"sequence_parallel": True})
    for log in pool.run(train, layout, world_size=2):
        torch.testing.assert_close(log, reference, rtol=1e-5, atol=0)


def norms_behind(layout: Layout) -> list[str]:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_block import TransformerBlock

    from helix_megatron.megatron.post_norms import with_post_norms

    start_megatron(layout)
    settings = with_rms_norms()
    spec = get_gpt_decoder_block_spec(
        settings, use_transformer_engine=False, normalization="RMSNorm"
    )
    block = TransformerBlock(settings, with_post_norms(use_available_norms(spec), before=True))
    return [name for name, _ in block.named_modules() if name.endswith("post_layernorm")]


def test_norms_behind_reach_attention_and_mlp(pool: RankPool) -> None:
    """Later megatron-cores hide the parts of an MLP in a partial function."""
    assert pool.run(norms_behind, Layout(), world_size=1)[0] == [
        "layers.0.self_attention.linear_proj.post_layernorm",
        "layers.0.mlp.linear_fc2.post_layernorm",
    ]
