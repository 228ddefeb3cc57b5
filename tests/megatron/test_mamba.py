"""Mamba layers in plain torch are the recurrence of arXiv 2405.21060, step by step, on any number of ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_gpt import Layout, start_megatron
from torch import Tensor

from helix_megatron.errors import HelixError

HEADS, DIMS, GROUPS, STATE, HIDDEN, KERNEL = 8, 6, 4, 5, 32, 4
INNER, MAPS = HEADS * DIMS, GROUPS * STATE  # of one group, too, with states of so many dimensions
SHAPES = {
    "in_proj.weight.z": (INNER, HIDDEN),
    "in_proj.weight.x": (INNER, HIDDEN),
    "in_proj.weight.B": (MAPS, HIDDEN),
    "in_proj.weight.C": (MAPS, HIDDEN),
    "in_proj.weight.dt": (HEADS, HIDDEN),
    "conv1d.weight.x": (INNER, 1, KERNEL),
    "conv1d.weight.B": (MAPS, 1, KERNEL),
    "conv1d.weight.C": (MAPS, 1, KERNEL),
    "conv1d.bias.x": (INNER,),
    "conv1d.bias.B": (MAPS,),
    "conv1d.bias.C": (MAPS,),
    "dt_bias": (HEADS,),
    "A_log": (HEADS,),
    "D": (HEADS,),
    "norm.weight": (INNER,),
    "out_proj.weight": (HIDDEN, INNER),
}


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What `scan` computes, one position after another."""
    B, C = (maps.repeat_interleave(len(A) // maps.shape[2], 2) for maps in (B, C))
    state, outputs = torch.zeros(*x[:, 0].shape, B.shape[-1], dtype=x.dtype), []
    for at in range(x.shape[1]):
        gained = torch.einsum("bh,bhp,bhn->bhpn", dt[:, at], x[:, at], B[:, at])
        state = (dt[:, at] * A).exp()[..., None, None] * state + gained
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, at]))
    return torch.stack(outputs, 1)


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("chunk", [1, 5, 8, 40])
def test_chunks_are_the_recurrence(chunk):
    """Output and gradients in fp64, with chunks that the length is a multiple of and others."""
    from helix_megatron.megatron.mamba import scan

    length = 16
    inputs = [
        drawn(2, length, HEADS, DIMS, seed=1),
        F.softplus(drawn(2, length, HEADS, seed=2)) * 3,
        -drawn(HEADS, seed=3).exp() * 5,
        drawn(2, length, GROUPS, STATE, seed=4),
        drawn(2, length, GROUPS, STATE, seed=5),
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    weight = drawn(2, length, HEADS, DIMS, seed=6)
    found, wanted = scan(*inputs, chunk), recurrence(*inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    gradients = (torch.autograd.grad((y * weight).sum(), inputs) for y in (found, wanted))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)


def whole_weights() -> dict[str, Tensor]:
    made = {name: drawn(*SHAPES[name], seed=at) * 0.3 for at, name in enumerate(SHAPES)}
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def whole_layer(x: Tensor, weights: dict[str, Tensor], groups: int) -> Tensor:
    """[L, B, D] → [L, B, D], with the whole weights and so many groups of heads."""
    z, dt = (x @ weights[f"in_proj.weight.{part}"].t() for part in ("z", "dt"))
    convolved = {}
    for part in "xBC":
        inputs = F.pad(x @ weights[f"in_proj.weight.{part}"].t(), (0, 0, 0, 0, KERNEL - 1, 0))
        kernel = weights[f"conv1d.weight.{part}"][:, 0]
        seen = sum(inputs[at : at + len(x)] * kernel[:, at] for at in range(KERNEL))
        convolved[part] = F.silu(seen + weights[f"conv1d.bias.{part}"]).transpose(0, 1)
    inner = convolved["x"].unflatten(-1, (HEADS, DIMS))
    B, C = (convolved[part].unflatten(-1, (groups, -1)) for part in "BC")
    steps = F.softplus(dt + weights["dt_bias"]).transpose(0, 1)
    y = recurrence(inner, steps, -weights["A_log"].exp(), B, C) + inner * weights["D"][:, None]
    gated = (y.flatten(2).transpose(0, 1) * F.silu(z)).unflatten(-1, (groups, -1))
    normed = gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return (normed.flatten(-2) * weights["norm.weight"]) @ weights["out_proj.weight"].t()


def config_of(ranks: int, groups: int) -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=ranks,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
        mamba_num_heads=HEADS,
        mamba_head_dim=DIMS,
        mamba_state_dim=MAPS // groups,
        mamba_num_groups=groups,
    )


def build(ranks: int, number: int) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from helix_megatron.megatron.hybrid import local_stack_spec

    start_megatron(Layout(tp=ranks))
    config, groups = config_of(ranks, number), ProcessGroupCollection.use_mpu_process_groups()
    mixer = local_stack_spec(config).submodules.mamba_layer.submodules.mixer
    layer = build_module(mixer, config, d_model=HIDDEN, layer_number=1, pg_collection=groups)
    assert (config.mamba_num_groups, config.mamba_state_dim) == (number, MAPS // number)
    return layer.double()


def errors_of_rank(ranks: int, groups: int) -> dict[str, float]:
    """Largest differences of output and gradients from those of the whole layer."""
    from helix_megatron.megatron.fill import own_part, sharded_weights

    layer, weights = build(ranks, groups), whole_weights()
    items = [(item, item.data) for item in sharded_weights(layer)]
    assert {id(data) for _, data in items} == {id(parameter) for parameter in layer.parameters()}
    for item, data in items:
        with torch.no_grad():
            data.copy_(own_part(item, lambda key, place, shape: weights[key]))
    x, weight = drawn(9, 2, HIDDEN, seed=50), drawn(9, 2, HIDDEN, seed=51)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found, wanted = layer(inputs[0])[0], whole_layer(inputs[1], weights, groups)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    errors = {"output": (found, wanted), "input": (inputs[0].grad, inputs[1].grad)}
    for item, data in items:
        part = own_part(item, lambda key, place, shape: weights[key].grad)
        errors[item.key] = (data.grad, part)
    return {name: float((own - other).abs().max()) for name, (own, other) in errors.items()}


@pytest.mark.parametrize(
    ("ranks", "groups"), [(1, GROUPS), (2, GROUPS), (4, GROUPS), (2, 1), (4, 1)]
)
def test_a_layer_is_that_of_one_rank(pool, ranks, groups):
    """megatron-core's layer with its own names and cuts: output, input and weight gradients in fp64."""
    for errors in pool.run(errors_of_rank, ranks, groups, world_size=ranks):
        assert len(errors) == 10
        assert max(errors.values()) < 1e-10, errors


def test_ranks_that_groups_cannot_be_dealt_to():
    """megatron-core asserts it without the valid values."""
    from helix_megatron.megatron.mamba import Mamba

    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 8))
    with pytest.raises(HelixError) as caught:
        Mamba(SimpleNamespace(mamba_num_groups=4), pg_collection=groups)
    assert str(caught.value) == (
        "4 groups of Mamba heads (mamba_num_groups) cannot be dealt to 8 tensor parallel ranks. "
        "Valid tensor parallel sizes: 1, 2, 4."
    )
    one = SimpleNamespace(mamba_num_groups=1, mamba_num_heads=12, mamba_state_dim=16)
    with pytest.raises(
        HelixError, match=r"12 Mamba heads .* and 16 states .* of one group.*: 1, 2, 4\."
    ):
        Mamba(one, pg_collection=groups)
