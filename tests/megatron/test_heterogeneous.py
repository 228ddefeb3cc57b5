"""Heterogeneous models: each layer's attention is cut by the layout of its own key-value heads."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
    get_gpt_heterogeneous_layer_spec,
)
from tiny_gpt import LENGTH, VOCABULARY, Layout, Log, build, start_megatron, train_step

from helix_megatron.arguments import as_flag
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.megatron.transformer_config import (
    HelixHeterogeneousTransformerConfig,
    HelixTransformerConfig,
    attention_layout,
)

STEPS = 4
KV_HEADS = (4, 2, None, None)
"""Of 4 query heads in a layer; instead of attention the third layer has a linear one, the fourth nothing."""


def blocks(*kv_heads: int | None) -> str:
    """What NVIDIA's model files say of layers with these key-value heads."""
    mlps = [{"ffn_mult": 1.0}, {"ffn_mult": None, "no_op": True}]
    layers = [
        {
            "attention": {
                "n_heads_in_group": heads and 4 // heads,
                "replace_with_linear": heads is None and number % 2 == 0,
                "no_op": heads is None and number % 2 == 1,
            },
            "ffn": {"no_op": False, "replace_with_linear": False, **mlps[number == 1]},
        }
        for number, heads in enumerate(kv_heads)
    ]
    return json.dumps({"block_configs": layers})


def settings(m: int, *kv_heads: int | None) -> dict[str, Any]:
    return {
        "num_layers": len(kv_heads),
        "hidden_size": 32,
        "num_attention_heads": 4,
        "heterogeneous_layers_config_encoded_json": blocks(*kv_heads),
        "helix": HelixConfig(m),
    }


def train(m: int) -> tuple[Log, list[tuple[int, str]]]:
    """Losses and gradient norms of one process, or of 4 tensor parallel ranks with cut heads; and the key-value
    heads and query layout of each layer that is cut."""
    from megatron.core.models.gpt import GPTModel

    from helix_megatron import parallel_state
    from helix_megatron.megatron.norms import use_available_norms
    from helix_megatron.megatron.self_attention import VirtualSelfAttention
    from helix_megatron.megatron.specs import helix_spec

    ranks = 2 * m if m > 1 else 1
    more = {"add_bias_linear": False, "normalization": "RMSNorm"}
    layout = Layout(tp=ranks, etp=ranks, config=settings(m, *KV_HEADS) | more)

    def chunk(config: Any, stage: int | None) -> Any:
        spec = use_available_norms(get_gpt_heterogeneous_layer_spec(config, pp_rank=0))
        return GPTModel(
            config,
            helix_spec(spec, config.helix),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
        )

    start_megatron(layout)
    parallel_state.register_intra_head_parallel(m)
    chunks, optimizer = build(layout, chunk, HelixHeterogeneousTransformerConfig)
    layouts = [
        (part.layout.num_kv_heads, part.layout.query_layout)
        for part in chunks[0].modules()
        if isinstance(part, VirtualSelfAttention)
    ]
    return [train_step(layout, chunks, optimizer) for _ in range(STEPS)], layouts


def test_losses_are_those_of_one_process(pool):
    """A layer cut by another layer's key-value heads, or left uncut, would train another model."""
    ((expected, none),) = pool.run(train, 1, world_size=1)
    assert none == []
    assert expected[-1][0] < expected[0][0] - 0.1
    for got, layouts in pool.run(train, 2, world_size=4):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert layouts == [(4, "heads"), (2, "heads")]


def test_each_layer_has_its_own_layout_from_the_start():
    """Megatron fills the layer's key-value heads in; the model's are those that its layers do not name."""
    config = HelixHeterogeneousTransformerConfig(
        **settings(2, 4, 2, None), tensor_model_parallel_size=4
    )
    layouts = [attention_layout(config.get_config_for_layer(number)) for number in (1, 2)]
    assert [(each.num_kv_heads, each.head_groups) for each in layouts] == [(4, 2), (2, 2)]
    layer = config.get_config_for_layer(2)
    assert isinstance(layer, HelixTransformerConfig)
    assert layer.ffn_hidden_size == config.ffn_hidden_size != 0
    stock = HelixHeterogeneousTransformerConfig(**settings(1, 4, 2))
    assert stock.get_config_for_layer(2).num_query_groups == 2


def test_the_configuration_of_one_layout_is_refused():
    """Megatron would ask it for the configuration of a layer, which it has not."""
    with pytest.raises(HelixError, match="Take HelixHeterogeneousTransformerConfig"):
        HelixTransformerConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            heterogeneous_block_specs=True,
            helix=HelixConfig(2),
            tensor_model_parallel_size=4,
        )
    config = HelixHeterogeneousTransformerConfig(**settings(2, 4, 2), tensor_model_parallel_size=4)
    with pytest.raises(ValueError, match="layer 0 is none of the layers 1 to 2"):
        config.get_config_for_layer(0)


def test_a_layer_that_does_not_fit_is_refused_when_the_model_is_configured():
    """Otherwise the first layers would be built, and the error would come from the last one."""
    with pytest.raises(HelixError) as error:
        HelixHeterogeneousTransformerConfig(**settings(2, 4, 1), tensor_model_parallel_size=4)
    assert error.value.worded(as_flag).startswith("1 key-value head cannot")
