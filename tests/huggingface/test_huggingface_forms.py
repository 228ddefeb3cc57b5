"""Models are cut by the form of their modules: the families of 2026, and classes that nobody has seen yet.

Against the library's own model in one process: logits within 1e-5 of the largest in fp32, greedy tokens equal,
gradients of a training step in fp64 within 1e-5 of their norm (some of the library's code is in fp32 always).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from tiers import sized
from tiny_transformers import (
    BY_FORM,
    left_padded,
    relative_error,
    tiny_config,
    tiny_model,
    tokens,
)
from tomorrow import TomorrowAttention, tomorrow
from torch import nn

from helix_megatron.errors import HelixError
from helix_megatron.huggingface import grad_norm, make_groups, plan, shard
from helix_megatron.huggingface.forms import SHOWN, mlp_cuts

LAYOUTS = {  # ranks, m; 8 ranks run in the full tier alone
    "m 2, n 1": (2, 2),
    "m 2, n 2": (4, 2),
    "m 4, n 1": (4, 4),
    "m 4, n 2": (8, 4),
}
OF_THEIR_OWN = (
    *(
        "apertus",
        "qwen3_next",
        "gpt_oss",
        "gemma3",
        "gemma4",
        "glm4_moe",
        "minimax_m2",
        "llama4",
        "phi3",
        "olmo2",
    ),
    *("granitemoe", "starcoder2", "mimo_v2_flash", "deepseek_v3", "nemotron_h", "falcon_h1"),
)
NEW_TOKENS = sized("conversion", full=32, quick=8)


def results(make: Callable[[torch.dtype], Any]) -> dict[str, Any]:
    """Logits, greedy tokens of a left-padded batch, and the gradients of a training step."""
    model = make(torch.float32)
    ids, mask = left_padded()
    with torch.no_grad():
        found = {"logits": model(tokens()).logits}
        found["tokens"] = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
        )
    model = make(torch.float64).train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    found |= {"gradients": {n: p.grad for n, p in model.named_parameters()}}
    return found | {"norm": grad_norm(model)}


@functools.cache
def reference(family: str, **changes: int) -> dict[str, Any]:
    return results(lambda dtype: built(family, dtype, **changes))


def built(family: str, dtype: torch.dtype, **changes: int) -> Any:
    model = tiny_model(family, dtype=dtype, **changes)
    if dtype is torch.float64 and hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped products have no fp64
    return model


def run_sharded(family: str, m: int, changes: dict[str, int]) -> dict[str, Any]:
    groups = make_groups(dist.get_world_size(), m)
    cut = {"tensor_group": groups.tensor, "intra_head_group": groups.intra_head}
    return results(lambda dtype: shard(built(family, dtype, **changes), m, **cut))


def assert_equals_whole(ranks: list[dict[str, Any]], wanted: dict[str, Any], cuts: Any) -> None:
    largest = max(g.norm() for g in wanted["gradients"].values() if g is not None)
    for rank, found in enumerate(ranks):
        assert relative_error(found["logits"], wanted["logits"]) <= 1e-5
        assert torch.equal(found["tokens"], wanted["tokens"])
        assert relative_error(found["norm"], wanted["norm"]) <= 1e-5
        for name, whole in wanted["gradients"].items():
            if whole is None:
                assert found["gradients"][name] is None, name
                continue
            own = cuts[name].take(whole, rank) if name in cuts else whole
            # Of some parameters, such as biases of keys, the gradient is zero but for rounding.
            scale = max(own.norm(), 1e-2 * largest)
            assert (found["gradients"][name] - own).norm() <= 1e-5 * scale, name


@pytest.mark.filterwarnings(
    "ignore:.* stay whole on every rank:UserWarning", "ignore:each rank has"
)
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        # The quick tier has those with something of their own, each at one layout.
        pytest.param(
            family,
            layout,
            marks=[pytest.mark.full("conversion")]
            * (family not in OF_THEIR_OWN or (i + j) % 3 > 0 or LAYOUTS[layout][0] == 8),
        )
        for i, family in enumerate(BY_FORM)
        for j, layout in enumerate(LAYOUTS)
    ],
)
def test_families_equal_the_whole_model(pool, family, layout):
    """Gates, sinks, windows, soft caps, norms of all heads, latents: all of it is the library's own code."""
    world_size, m = LAYOUTS[layout]
    changes = {"num_attention_heads": max(4, world_size)}
    if family.startswith("deepseek"):
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    what = plan(tiny_model(family, **changes), m, world_size)
    assert what.layout.query_layout == "heads"
    ranks = pool.run(run_sharded, family, m, changes, world_size=world_size, timeout=300)
    assert_equals_whole(ranks, reference(family, **changes), what.cuts)


def test_every_type_that_counts_as_shown_is_shown():
    """A type on that list is not compared before and after: a test here must have done it."""
    assert {tiny_config(family).model_type for family in BY_FORM} == SHOWN


def test_mlps_with_adapters_stay_whole():
    """As in Zamba 2, where each use of a shared MLP has an adapter beside its first projection."""
    mlp = nn.Module()
    mlp.gate_up_proj, mlp.down_proj = nn.Linear(8, 32), nn.Linear(16, 8)
    assert dict(mlp_cuts(mlp, 2))
    mlp.adapters = nn.ModuleList([nn.Linear(8, 32)])
    assert not dict(mlp_cuts(mlp, 2))
    model = tiny_model("glm4")
    for layer in model.model.layers:
        layer.mlp.adapters = nn.ModuleList([nn.Linear(8, 32)])
    what = plan(model, 2, 2)
    assert what.attention and not what.mlps


@pytest.mark.parametrize(("ranks", "cut"), [(2, True), (4, False)])
def test_gated_delta_nets_are_cut_where_the_ranks_divide_their_key_heads(ranks, cut):
    """Two key heads: on two ranks each has one, with its value heads, and half of all matrices."""
    model = tiny_model("qwen3_5")
    what = plan(model, 2, ranks)
    path = "model.layers.0.linear_attn"
    assert what.delta_nets == [path] * cut
    whole = {n: t for n, t in model.state_dict().items() if n.startswith(path) and "norm" not in n}
    for rank in range(ranks):
        own = what.split(whole, rank)
        assert {n: t.numel() for n, t in own.items()} == {
            n: t.numel() // (ranks if cut else 1) for n, t in whole.items()
        }


def run_states(family: str) -> list[tuple[int, ...]]:
    groups = make_groups(2, 2)
    model = shard(tiny_model(family), 2, tensor_group=groups.tensor)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(), past_key_values=cache, use_cache=True)
    states = cache.layers[0]
    return [
        tuple(state.shape)
        for kept in (states.conv_states, states.recurrent_states)
        for state in (kept.values() if isinstance(kept, dict) else kept)
        if state is not None
    ]


@pytest.mark.skipif(
    not hasattr(transformers.DynamicCache, "has_previous_state"),
    reason="early transformers 5 keeps states in caches of each model's own",
)
@pytest.mark.parametrize(
    ("family", "convolution", "heads"),
    [
        ("qwen3_next", 32, (2, 8, 8)),  # one of 2 key heads, 2 of 4 value heads
        ("nemotron_h", 4 * 8 + 2 * 16, (4, 8, 16)),  # one of 2 groups, 4 of 8 heads
        ("falcon_h1", 4 * 8 + 2 * 16, (4, 8, 16)),  # the only group
    ],
)
def test_states_of_a_rank_are_those_of_its_heads(pool, family, convolution, heads):
    """Half of the states of the whole model, but for what writes and reads the states of a shared group."""
    for shapes in pool.run(run_states, family, world_size=2, timeout=300):
        assert set(shapes) == {(2, convolution, 4), (2, *heads)}


def run_caches(family: str) -> list[tuple[int, ...]]:
    groups = make_groups(4, 4)
    model = shard(tiny_model(family), 4, tensor_group=groups.tensor)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(), past_key_values=cache, use_cache=True)
    return [tuple(layer.keys.shape) for layer in cache.layers]


def test_caches_hold_each_head_once(pool):
    """2 key-value heads of 16 on 4 ranks: a quarter of both on each, where whole heads would be there twice."""
    for shapes in pool.run(run_caches, "gemma3", world_size=4, timeout=300):
        assert shapes[1] == (2, 2, 12, 4)


# ------------------------------------------------------------------ model types of tomorrow


class ReversedAttention(TomorrowAttention):
    """Of the known form, but heads see their neighbours: on whole heads of one rank it is another model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(*args, **kwargs)
        return output + self.q_proj(args[0] if args else kwargs["hidden_states"]).mean(), weights


class GatedAttention(TomorrowAttention):
    """With a part of its own."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.head_gate = nn.Linear(config.hidden_size, config.num_attention_heads)


def run_tomorrow(attention: type[TomorrowAttention]) -> dict[str, Any] | str:
    groups = make_groups(2, 2)

    def make(dtype: torch.dtype) -> Any:
        return shard(tomorrow(attention).to(dtype), 2, tensor_group=groups.tensor)

    try:
        return results(make)
    except HelixError as error:
        return str(error)


def test_a_type_of_tomorrow_is_cut_by_its_form(pool):
    """A model that is released next month works without a release of ours."""
    cuts = plan(tomorrow(TomorrowAttention), 2, 2).cuts
    ranks = pool.run(run_tomorrow, TomorrowAttention, world_size=2, timeout=300)
    assert_equals_whole(ranks, results(tomorrow(TomorrowAttention).to), cuts)


def test_what_only_looks_like_the_form_is_found_out(pool):
    """The form tells sizes, not what is computed: logits are compared before and after."""
    for said in pool.run(run_tomorrow, ReversedAttention, world_size=2, timeout=300):
        assert "models of type tomorrow are not known to this release" in said
        assert "gives other logits, by" in said


def test_mlps_whose_activation_has_learned_numbers_are_cut():
    """xIELU of Apertus has two, whole on every rank; their gradients are compared above."""
    what = plan(tiny_model("apertus"), 2, 2)
    assert what.mlps == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_an_unknown_part_is_named():
    """What has parameters might act on whole heads."""
    with pytest.raises(HelixError, match=r"class GatedAttention has a part head_gate \(Linear\)"):
        plan(tomorrow(GatedAttention), 2, 2)
    with pytest.raises(HelixError, match=r"heads on 8 ranks .* Valid numbers of ranks: 1, 2, 4\."):
        plan(tiny_model("glm4"), 8, 8)
