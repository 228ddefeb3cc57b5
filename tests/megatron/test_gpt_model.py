"""A whole GPT model: its sharded state, its initial weights, and Megatron's static inference context."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from training_runs import build

from helix_megatron.errors import HelixError

SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --kv-channels 16 --seq-length 16 --swiglu --normalization RMSNorm"
)
CUT = "--tensor-model-parallel-size 4 --intra-head-parallel-size 2"
LAYOUTS = {
    "segments": f"{SMALL} {CUT} --helix-query-layout segments",
    "heads": f"{SMALL} {CUT} --helix-query-layout heads",
    "partial rotary": f"{SMALL} {CUT} --rotary-percent 0.5 --helix-query-layout segments",
    "experts": f"{SMALL} {CUT} --num-experts 4 --sequence-parallel --disable-bias-linear",
}


def boxes(flags: str, world_size: int) -> list[tuple[str, tuple, tuple, np.ndarray, bool]]:
    """(key, global shape, global offset, data, whether this is the main replica) of each sharded tensor."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        apply_factories,
        is_main_replica,
    )

    _, _, model = build(flags, world_size)
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = model.sharded_state_dict(metadata=groups)
    apply_factories(state)
    found = []
    for item in nested_values(state):
        if isinstance(item, ShardedTensor):
            shape = (1,) * item.prepend_axis_num + tuple(item.local_shape)
            data = item.data.detach().numpy().reshape(shape).copy()
            main = is_main_replica(item.replica_id)
            found.append((item.key, item.global_shape, item.global_offset, data, main))
    return found


def whole(by_rank: list[list[tuple]]) -> dict[str, np.ndarray]:
    """The global tensors, each element from exactly one main replica."""
    tensors: dict[str, np.ndarray] = {}
    written: dict[str, np.ndarray] = {}
    for key, shape, offset, data, main in (box for rank in by_rank for box in rank):
        if not main:
            continue
        target = tensors.setdefault(key, np.zeros(shape, dtype=data.dtype))
        count = written.setdefault(key, np.zeros(shape, dtype=int))
        place = tuple(
            slice(start, start + size) for start, size in zip(offset, data.shape, strict=True)
        )
        target[place] = data
        count[place] += 1
    assert all((count == 1).all() for count in written.values()), "each element exactly once"
    return tensors


@pytest.mark.parametrize("name", LAYOUTS)
def test_sharded_state_and_initial_weights_are_those_of_a_stock_model(pool, name):
    """Same keys, same global shapes, same order of rows, same values: a checkpoint knows nothing of m and n."""
    flags = LAYOUTS[name]
    stock = flags.split(" --tensor-model-parallel-size")[0]
    extra = " ".join(f for f in flags.split(CUT)[1].split() if "sequence-parallel" not in f)
    extra = extra.split("--helix-query-layout")[0]
    expected = whole(pool.run(boxes, f"{stock} {extra}", 1, world_size=1))
    got = whole(pool.run(boxes, flags, 4, world_size=4))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].shape == value.shape, key
        np.testing.assert_array_equal(got[key], value, err_msg=key)
    drawn = [value for key, value in expected.items() if key.endswith("linear_qkv.weight")]
    assert drawn
    assert all(0.015 < value.std() < 0.025 for value in drawn)


def undrawn_weight() -> str:
    from helix_megatron.megatron.initialize import initialize_weights

    run, config, model = build(SMALL, 1)
    model.register_parameter("stray", torch.nn.Parameter(torch.zeros(2, 2)))
    original = model.sharded_state_dict

    def without_stray(*positional: Any, **named: Any) -> dict:
        return {k: v for k, v in original(*positional, **named).items() if k != "stray"}

    model.sharded_state_dict = without_stray
    with pytest.raises(HelixError) as error:
        initialize_weights(model, config, run.training.seed)
    return str(error.value)


def test_a_weight_without_a_place_is_an_error(pool):
    """Left undrawn, or drawn per rank, it would make the model depend on the layout silently."""
    assert pool.run(undrawn_weight, world_size=1)[0] == (
        "weight stray of shape (2, 2) is not in the model's sharded state dictionary, so its initial value "
        "would depend on the layout."
    )


def prefill_and_decode(flags: str, world_size: int) -> float:
    """Largest difference between logits of a full forward pass and of prefill plus token-by-token decoding."""
    from megatron.core.inference.contexts import StaticInferenceContext

    _, _, model = build(flags, world_size)
    model.eval()
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(12).expand(2, -1)
    with torch.no_grad():
        full = model(tokens, positions, None, runtime_gather_output=True)
        context = StaticInferenceContext(max_batch_size=2, max_sequence_length=16)
        start, outputs = 0, []
        for length in (8, 1, 1, 1, 1):
            part = slice(start, start + length)
            logits = model(
                tokens[:, part],
                positions[:, part],
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
            outputs.append(logits[:, -1])
            context.increment_sequence_len_offset(length)
            start += length
    cached = torch.stack(outputs, dim=1)
    assert cached.abs().max() > 0
    return (cached - full[:, 7:]).abs().max().item()


@pytest.mark.parametrize("name", ["segments", "heads", "partial rotary"])
def test_static_inference_context_holds_segments(pool, name):
    """Prefill and decoding with cached segments give the logits of a full forward pass."""
    assert max(pool.run(prefill_and_decode, LAYOUTS[name], 4, world_size=4)) <= 1e-5


def losses_with_more_predictions(flags: str, world_size: int) -> list[float]:
    """Losses of a model that predicts one token more, in steps of plain gradient descent."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    from helix_megatron.megatron.initialize import initialize_weights, weights_not_drawn
    from helix_megatron.megatron.norms import use_available_norms
    from helix_megatron.megatron.specs import helix_spec

    run, config, _ = build(flags, world_size)
    config.mtp_num_layers = 1
    spec = use_available_norms(
        gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization
        )
    )
    more = use_available_norms(gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, False))
    with weights_not_drawn(config):
        model = GPTModel(
            config,
            helix_spec(spec, config.helix),
            mtp_block_spec=helix_spec(more, config.helix),
            **run.model.gpt_settings,
        )
    initialize_weights(model, config, run.training.seed)
    layers = [module for module in model.modules() if hasattr(module, "self_attention")]
    assert len(layers) == 3
    assert all(hasattr(layer.self_attention, "layout") for layer in layers) == (world_size > 1)
    random = torch.Generator().manual_seed(3)
    losses = []
    tokens = torch.randint(0, 256, (2, 17), generator=random)
    positions = torch.arange(16).expand(2, -1)
    for _ in range(3):
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.5 * parameter.grad)
                parameter.grad = None
    return losses


@pytest.mark.parametrize("query_layout", ["heads", "segments"])
def test_layers_of_multi_token_prediction_are_cut_too(pool, query_layout):
    """Their attention has the same heads. Later losses tell of their gradients, which flow into the model."""
    flags = f"{SMALL} {CUT} --helix-query-layout {query_layout}"
    alone = pool.run(losses_with_more_predictions, SMALL, 1, world_size=1)[0]
    for losses in pool.run(losses_with_more_predictions, flags, 4, world_size=4):
        np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)
    assert alone[2] < alone[0] - 0.01, "nothing was learned, so gradients were not tested"
