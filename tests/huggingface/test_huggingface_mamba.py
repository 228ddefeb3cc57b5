"""Mamba 2 layers are cut by their own heads, with the groups that write and read their states."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from test_huggingface_forms import assert_equals_whole, reference, run_sharded
from tiny_transformers import tiny_config, tiny_model, tokens

from helix_megatron.core.meter import measure
from helix_megatron.huggingface import make_groups, plan, shard
from helix_megatron.plan.clusters import CLUSTERS
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import spec_of_config
from helix_megatron.plan.operators import linear_steps
from helix_megatron.plan.settings import Job, Scenario, Software
from helix_megatron.plan.steps import FORWARD

NEMOTRON, FALCON = "model.layers.0.mixer", "model.layers.0.mamba"  # with 2 groups, with one
HYBRIDS = ("nemotron_h", "falcon_h1", "bamba", "granitemoehybrid")


def modelling(family: str) -> Any:
    return import_module(f"transformers.models.{family}.modeling_{family}")


pytestmark = pytest.mark.skipif(
    not hasattr(modelling("falcon_h1"), "mamba2_split_conv1d_scan_combined"),
    reason="early transformers 5 keeps the states of all heads in caches of its own: such layers stay whole",
)


@pytest.mark.parametrize(
    ("family", "path", "ranks", "whole"),
    [
        ("nemotron_h", NEMOTRON, 2, set()),
        ("nemotron_h", NEMOTRON, 4, {"conv1d.weight", "conv1d.bias"}),
        ("falcon_h1", FALCON, 2, {"conv1d.weight", "conv1d.bias"}),
    ],
)
def test_each_weight_is_held_once(family, path, ranks, whole):
    """But for the few of the convolution where several ranks have heads of one group."""
    model = tiny_model(family)
    what = plan(model, 2, ranks)
    state = model.get_submodule(path).state_dict(prefix=f"{path}.")
    for rank in range(ranks):
        for name, part in what.split(state, rank).items():
            shares = 1 if name.removeprefix(f"{path}.") in whole else ranks
            assert part.numel() * shares == state[name].numel(), name


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("nemotron_h", {"n_groups": 8, "mamba_num_heads": 6, "mamba_head_dim": 8}),  # heads
        ("nemotron_h", {"n_groups": 3, "mamba_num_heads": 12}),  # groups
        ("falcon_h1", {"mamba_d_state": 6}),  # states of the only group
    ],
)
def test_what_the_ranks_do_not_divide_stays_whole(family, changes):
    """As it was before: exact, and in the memory of every rank."""
    assert plan(tiny_model(family), 2, 4).mambas
    what = plan(tiny_model(family, **changes), 2, 4)
    assert not what.mambas
    assert not [name for name in what.cuts if "A_log" in name]


def test_layers_with_states_of_all_heads_stay_whole(monkeypatch):
    """Their caches would not fit a rank's states."""
    mixer = modelling("falcon_h1").FalconH1Mixer

    def forward(self: Any, hidden_states: Any, cache_params: Any = None) -> None: ...

    monkeypatch.setattr(mixer, "forward", forward)
    assert not plan(tiny_model("falcon_h1"), 2, 2).mambas


class FusedKernelRan(Exception):
    """Raised by what stands in for a kernel."""


def training_loss(model: Any) -> float:
    return model.train()(tokens(), labels=tokens(), use_cache=False).loss.item()


def loss_beside_kernel(*, cut: bool) -> float:
    """The loss of a training step where the library has its fused kernel."""
    model = tiny_model("nemotron_h")
    if cut:
        shard(model, 2, tensor_group=make_groups(2, 2).tensor)
    kernel = "mamba2_split_conv1d_scan_combined"
    with mock.patch.object(modelling("nemotron_h"), kernel, side_effect=FusedKernelRan):
        return training_loss(model)


def test_the_fused_kernel_never_runs_on_a_part(pool):
    """It computes the gated norm and the output projection, too, and would leave the other ranks out."""
    with pytest.raises(FusedKernelRan):
        loss_beside_kernel(cut=False)
    wanted = training_loss(tiny_model("nemotron_h"))
    for loss in pool.run(loss_beside_kernel, cut=True, world_size=2):
        assert loss == pytest.approx(wanted, rel=1e-5)


def loss_beside_convolution(family: str) -> float:
    """The loss of a training step where the library has its convolution kernel, which refuses other layouts."""
    model = shard(tiny_model(family), 2, tensor_group=make_groups(2, 2).tensor)
    kernel = modelling(family).causal_conv1d_fn

    def convolution(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert x.stride(1) == 1 and x.stride(0) % 8 == x.stride(2) % 8 == x.size(1) % 8 == 0
        return kernel(x, *args, **kwargs)

    with mock.patch.object(modelling(family), "causal_conv1d_fn", convolution):
        return training_loss(model)


@pytest.mark.parametrize("family", ["nemotron_h", "falcon_h1"])
def test_rows_are_aligned_for_the_convolution(pool, family):
    """Four heads on each rank: what lies beside each other in memory is no multiple of 8 elements."""
    wanted = training_loss(tiny_model(family))
    for loss in pool.run(loss_beside_convolution, family, world_size=2):
        assert loss == pytest.approx(wanted, rel=1e-5)


def test_without_a_gated_norm(pool):
    """As most models of Falcon-H1 are."""
    changes = {"mamba_rms_norm": False}
    cuts = plan(tiny_model("falcon_h1", **changes), 2, 2).cuts
    ranks = pool.run(run_sharded, "falcon_h1", 2, changes, world_size=2, timeout=300)
    assert_equals_whole(ranks, reference("falcon_h1", **changes), cuts)


def bytes_of_shared_groups(settings: dict[str, Any]) -> int:
    """What this rank sends for them in a pass over 24 tokens in half precision."""
    model = tiny_model("nemotron_h", dtype=torch.bfloat16, **settings)
    shard(model, 4, tensor_group=make_groups(4, 4).tensor)
    with measure() as meter, torch.no_grad():
        model(tokens(), use_cache=False)
    return meter.bytes("tensor/mamba")


@pytest.mark.parametrize("settings", [{}, {"n_groups": 1}])
def test_bytes_of_shared_groups_are_those_that_are_sent(pool, settings):
    """Two or four of 4 ranks have heads of one group of Mamba."""
    model = spec_of_config("nemotron", tiny_config("nemotron_h", **settings).to_dict(), "")
    scenario = Scenario(model, Job("prefill", 12, 2), CLUSTERS["nvlink-16"], Software())
    steps = linear_steps(scenario, Layout(tp=4, micro_batch=2))
    planned = sum(s.sent for s in steps if "shared group" in s.name and s.phase == FORWARD)
    assert planned > 0
    assert pool.run(bytes_of_shared_groups, settings, world_size=4) == [planned] * 4


@pytest.mark.full("conversion")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in HYBRIDS),  # one group, of Nemotron two, on eight ranks
        ("nemotron_h", {"n_groups": 8}),
        ("nemotron_h", {"n_groups": 4}),  # on two ranks each, where key-value heads are on four
    ],
)
def test_hybrids_on_eight_ranks(pool, family, changes):
    """(m, n) = (4, 2), with one query head and one head of a Mamba layer on each rank."""
    changes |= {"num_attention_heads": 8}
    what = plan(tiny_model(family, **changes), 4, 8)
    assert what.mambas
    ranks = pool.run(run_sharded, family, 4, changes, world_size=8, timeout=300)
    assert_equals_whole(ranks, reference(family, **changes), what.cuts)
