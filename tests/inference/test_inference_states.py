"""Layers with states, many sequences in a step: each as if it were alone, and one call for all that decode.

Outputs are equal to 1e-4: whatever the weights are, the library computes the recurrence in fp32.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from helix_megatron.core.caches.pages import Piece
from helix_megatron.inference.transformers_states import States

transformers = pytest.importorskip("transformers", reason="it makes the layers")
SIZE = 32
# Of each step, (sequence, tokens): prompts in chunks and of one token, some that wait, go, come again, or join.
STEPS: list[list[tuple[int, int]]] = [
    [(0, 5), (1, 1)],
    [(0, 1), (1, 1), (2, 3)],
    [(0, 1), (1, 1), (2, 4)],
    [(0, 1), (1, 1), (2, 1)],
    [(0, 1), (1, 1), (2, 1)],
    [(2, 1), (0, 1)],
    [(0, 1), (2, 1), (3, 2)],
    [(0, 1), (1, 2), (3, 1)],
    [(0, 1), (1, 1), (3, 1)],
]
DROPS = {7: [1, 2]}  # before that step; 1 begins anew


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    heads = {f"linear_num_{kind}_heads": 4 for kind in ("key", "value")}
    dims = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    config = transformers.Qwen3NextConfig(
        vocab_size=32,
        hidden_size=SIZE,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
        num_experts=2,
        initializer_range=0.5,
        **heads,
        **dims,
    )
    return transformers.Qwen3NextForCausalLM(config).eval()


@torch.inference_mode()
def test_sequences_of_a_step_are_computed_as_if_alone(model):
    """Each layer is called once for all sequences that add a token, and once for each longer piece."""
    paths = [f"model.layers.{layer}.linear_attn" for layer in range(2)]
    layers = [model.get_submodule(path) for path in paths]
    alone, calls = [layer.forward for layer in layers], []
    for layer, forward in zip(layers, alone, strict=True):

        def counted(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            calls.append(args[0].shape)
            return _forward(*args, **kwargs)

        layer.forward = counted
    states = States(model, paths)
    lengths = dict.fromkeys(range(4), 0)
    inputs: dict[int, list[torch.Tensor]] = {}
    found: dict[int, list[torch.Tensor]] = {}
    for number, step in enumerate(STEPS):
        for sequence in DROPS.get(number, ()):
            states.drop(sequence)
            lengths[sequence] = 0
        pieces = []
        for sequence, count in step:
            pieces.append(Piece(sequence, lengths[sequence], np.zeros(count, np.int64), 0, (), 0))
            if lengths[sequence] == 0:
                inputs[sequence], found[sequence] = [], []
            lengths[sequence] += count
        hidden = torch.randn(1, sum(count for _, count in step), SIZE)
        states.begin(pieces)
        calls.clear()
        outputs = layers[1](layers[0](hidden))
        batch = sum(p.start > 0 and len(p.tokens) == 1 for p in pieces)
        assert len(calls) == 2 * (len(pieces) - batch + (batch > 0))
        assert (batch, 1, SIZE) in calls or not batch
        for (sequence, _), own, output in zip(
            step,
            hidden.split([count for _, count in step], dim=1),
            outputs.split([count for _, count in step], dim=1),
            strict=True,
        ):
            inputs[sequence].append(own)
            found[sequence].append(output)
    assert len(states) == 3
    for sequence, parts in inputs.items():
        wanted = alone[1](alone[0](torch.cat(parts, dim=1)))
        outputs = torch.cat(found[sequence], dim=1)
        assert (outputs - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    together = weakref.ref(states._together.cache)
    for sequence in inputs:
        states.drop(sequence)
    assert together() is None, "states stay when their sequences are gone"
