"""The catalog of canonical tensors and their parts, against real models of megatron-core, rank by rank."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import BASE, EXPERTS, GQA, build, flags_of, value_of

from helix_megatron.checkpoint.catalog import (
    Cut,
    catalog,
    extra_states,
    segment_local_flags,
    segment_local_permutation,
)
from helix_megatron.checkpoint.partition import RankLayout
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.model.description import ModelConfig

IN_FULL_TIER = functools.partial(pytest.param, marks=pytest.mark.full("conversion"))
# model, (tp, pp, ep, etp, m), query layout, world size
CASES = [
    ("dense", (1, 1, 1, 1, 1), "auto", 1),
    ("dense", (2, 2, 1, 2, 1), "auto", 4),
    IN_FULL_TIER("dense", (4, 1, 1, 4, 2), "segments", 4),
    ("gqa", (4, 1, 1, 4, 2), "segments", 4),
    ("gqa", (4, 1, 1, 4, 2), "heads", 4),
    IN_FULL_TIER("gqa", (2, 2, 1, 2, 2), "auto", 4),
    ("qk norm, gates, partial rotary", (2, 2, 1, 2, 2), "segments", 4),
    ("qk norm, gates, partial rotary", (4, 1, 1, 4, 4), "auto", 4),
    ("positions", (2, 2, 1, 2, 2), "auto", 4),
    ("experts", (2, 1, 2, 2, 2), "auto", 4),
    IN_FULL_TIER("experts", (2, 1, 2, 1, 2), "auto", 2),
    ("experts", (1, 2, 2, 1, 1), "auto", 4),
    ("experts with biases", (2, 1, 1, 1, 2), "auto", 2),
    ("every other layer has experts", (2, 2, 1, 2, 2), "auto", 4),
    ("layers listed", (2, 1, 2, 1, 2), "auto", 2),
]


def state_of_rank(
    flags: dict[str, Any], sizes: tuple[int, ...], query_layout: str, world_size: int
) -> tuple[tuple[int, ...], dict[str, Any], set[tuple], set[tuple]]:
    """(coordinates, state dictionary of a model filled with `value_of`, its global tensors, its objects)."""
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        apply_factories,
    )

    from helix_megatron.megatron.fill import fill_weights

    model = build(flags, sizes, query_layout, world_size)
    whole = {tensor.name: torch.from_numpy(value_of(tensor)) for tensor in catalog(flags)}
    fill_weights(model, whole.__getitem__)
    coordinates = (
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_expert_model_parallel_rank(),
        mpu.get_expert_tensor_parallel_rank(),
    )
    state = {
        name: None if value is None else value.detach().numpy().copy()
        for name, value in model.state_dict().items()
    }
    groups = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    sharded = model.sharded_state_dict(metadata=groups)
    apply_factories(sharded)
    items = list(nested_values(sharded))
    tensors = {
        (item.key, tuple(item.global_shape)) for item in items if isinstance(item, ShardedTensor)
    }
    objects = {
        (item.key, tuple(item.global_offset), tuple(item.global_shape))
        for item in items
        if isinstance(item, ShardedObject)
    }
    return coordinates, state, tensors, objects


@pytest.mark.parametrize(("model", "sizes", "query_layout", "world_size"), CASES)
def test_every_rank_holds_what_the_catalog_says(pool, model, sizes, query_layout, world_size):
    """Names, shapes and every element: what the converter writes for a rank is what its model would save."""
    flags = flags_of(model)
    tp, pp, ep, etp, m = sizes
    helix = HelixConfig(m, query_layout=query_layout)
    layout = RankLayout(flags, tp, pp, ep, etp, helix)
    tensors = catalog(flags)
    ranks = pool.run(state_of_rank, flags, sizes, query_layout, world_size, world_size=world_size)

    places = [layout.place(rank) for rank in range(layout.num_ranks)]
    seen = set()
    for coordinates, state, _, _ in ranks:
        matching = [p for p in places if vars(p) == dict(zip(vars(p), coordinates, strict=True))]
        assert len(matching) == 1, f"no rank of the layout is at {coordinates}"
        seen.add(coordinates)
        place = matching[0]
        names = {tensor.name: layout.local_name(tensor, place) for tensor in tensors}
        expected = {name for name in names.values() if name is not None}
        assert len(expected) == sum(name is not None for name in names.values()), "a name twice"
        expected |= set(layout.local_extra_states(tensors, place))
        assert set(state) == expected
        for tensor in tensors:
            name = names[tensor.name]
            if name is None:
                continue
            part = layout.part(tensor, place)
            value = value_of(tensor)
            if part.axis is not None:
                value = np.take(value, part.index, part.axis)
                value = np.pad(value, [(0, part.padding)] + [(0, 0)] * (value.ndim - 1))
            assert part.shape(tensor.shape) == value.shape
            np.testing.assert_array_equal(state[name], value, err_msg=f"{name} at {coordinates}")
    assert len(seen) == len(places), "the pool's ranks hold all parts"

    shared = {(tensor.key, tensor.global_shape) for tensor in tensors}
    padded = (layout.padded_vocabulary, flags["hidden_size"])
    shared = {
        (key, padded if key.endswith(("word_embeddings.weight", "output_layer.weight")) else shape)
        for key, shape in shared
    }
    assert set().union(*(tensors for _, _, tensors, _ in ranks)) == shared
    stored = set(extra_states(flags))
    assert set().union(*(objects for _, _, _, objects in ranks)) <= stored


def test_every_element_belongs_to_a_rank():
    """Without any process: the parts of all ranks cover each tensor, and a cut one exactly once."""
    flags = BASE | EXPERTS | GQA | {"moe_shared_expert_intermediate_size": 16}
    layout = RankLayout(flags, 4, 2, 2, 2, HelixConfig(2), vocabulary_multiple=8)
    assert layout.num_ranks == 8
    for tensor in catalog(flags):
        counts = np.zeros(tensor.shape, int)
        for rank in range(layout.num_ranks):
            place = layout.place(rank)
            if layout.local_name(tensor, place) is not None:
                part = layout.part(tensor, place)
                region = [slice(None)] * counts.ndim
                if part.axis is not None:
                    region[part.axis] = part.index
                counts[tuple(region)] += 1
        assert (counts > 0).all(), tensor.name
        assert (counts == counts.flat[0]).all(), tensor.name
        if tensor.cut is not Cut.REPLICATED and tensor.expert is None and tensor.layer is not None:
            assert counts.flat[0] == 1, tensor.name


def test_the_vocabulary_is_padded_with_rows_that_belong_to_nobody():
    """100 rows on 4 ranks in multiples of 8: 32 rows each, of which the last rank has 28 of padding."""
    layout = RankLayout(BASE, 4, vocabulary_multiple=8)
    parts = [layout.part(catalog(BASE)[0], layout.place(rank)) for rank in range(4)]
    assert [len(part.index) for part in parts] == [32, 32, 32, 4]
    assert [part.padding for part in parts] == [0, 0, 0, 28]


@pytest.mark.parametrize("output_gate", [False, True])
def test_segment_local_is_what_virtual_heads_compute(output_gate):
    """Against a forward pass written out: attention of each segment by itself, its own queries and keys."""
    h, g, d, m, hidden, length = 4, 2, 8, 2, 6, 5
    r, blocks = h // g, (h // g) * (2 if output_gate else 1) + 2
    random = np.random.default_rng(0)
    weight = random.standard_normal((g * blocks * d, hidden))
    out = random.standard_normal((hidden, h * d))
    x = random.standard_normal((length, hidden))
    model = ModelConfig(
        hidden_size=hidden,
        num_attention_heads=h,
        group_query_attention=True,
        num_query_groups=g,
        kv_channels=d,
        attention_output_gate=output_gate,
    )
    rows, columns = segment_local_permutation(model, m)
    assert sorted(rows) == list(range(len(weight)))
    assert sorted(columns) == list(range(h * d))

    def attend(w, o, heads, groups, dim, cut):
        per = (blocks - 2 if groups == g or groups == g * m else 0) + 2
        y = (x @ w.T).reshape(length, groups, per, dim)
        results = np.zeros((length, heads, dim))
        for group in range(groups):
            for head in range(r):
                for dims in cut:
                    q = y[:, group, head][:, dims]
                    k, v = y[:, group, -2][:, dims], y[:, group, -1][:, dims]
                    scores = np.exp(q @ k.T)
                    mixed = scores / scores.sum(1, keepdims=True) @ v
                    if output_gate:
                        mixed = mixed * y[:, group, r + head][:, dims]
                    results[:, group * r + head, dims] = mixed
        return results.reshape(length, -1) @ o.T

    halves = [np.r_[0:2, 4:6], np.r_[2:4, 6:8]]  # rotary pairs (k, k + 4) stay together
    expected = attend(weight, out, h, g, d, halves)
    got = attend(weight[rows], out[:, columns], h * m, g * m, d // m, [np.arange(d // m)])
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_segment_local_flags():
    """The converted checkpoint is of a stock model with m times the heads; QK norms have no place in it."""
    flags = segment_local_flags(BASE | GQA, 2)
    assert (flags["num_attention_heads"], flags["num_query_groups"], flags["kv_channels"]) == (
        8,
        4,
        8,
    )
    before = {tensor.name: tensor.shape for tensor in catalog(BASE | GQA)}
    assert {tensor.name: tensor.shape for tensor in catalog(flags)} == before
    with pytest.raises(HelixError, match="qk_layernorm"):
        segment_local_flags(BASE | {"qk_layernorm": True}, 2)


WRONG = [
    (
        {},
        {"tensor": 8},
        "4 heads cannot be dealt whole to 8 tensor parallel ranks. Valid: 1, 2, 4.",
    ),
    ({}, {"tensor": 3, "helix": HelixConfig(3)}, "Valid numbers of segments"),
    ({}, {"pipeline": 3}, "4 layers cannot be dealt evenly to 3 pipeline stages. Valid: 1, 2, 4."),
    ({"ffn_hidden_size": 50}, {"tensor": 4}, "(ffn_hidden_size)"),
    (EXPERTS, {"expert": 3}, "4 experts cannot be dealt evenly to 3 ranks"),
    (EXPERTS | {"moe_ffn_hidden_size": 6}, {"tensor": 4}, "moe_ffn_hidden_size"),
    ({}, {"expert": 2}, "no experts"),
    ({}, {"tensor": 0}, "less than 1"),
    ({"num_layers": None}, {}, "num_layers = None"),
    (EXPERTS | {"moe_layer_freq": [1, 0]}, {}, "lists 2 layers, and num_layers is 4"),
]


@pytest.mark.parametrize(("flags", "sizes", "text"), WRONG)
def test_what_does_not_fit_says_what_would(flags, sizes, text):
    """A converter that starts on an impossible layout would fail hours later."""
    with pytest.raises(HelixError) as error:
        RankLayout(BASE | flags, **sizes)
    assert text in str(error.value)
