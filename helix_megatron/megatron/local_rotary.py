"""Another rotary base, not scaled, in layers with a sliding window; megatron-core has one for all layers.

Gemma 3 has another base there, and OLMo 3 the same, but yarn in the other layers only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

YARN_FACTOR = "_yarn_concentration_factor"  # in which later releases keep what yarn's settings say


def turn_windowed_layers(
    model: Any, windowed: tuple[bool, ...], base: float, stretch: float
) -> None:
    """Give layers with a window angles of their own base.

    A hook on the layer makes them of the angles that it is given. Those of the first pair are the positions,
    divided by `stretch`, whatever part of a sequence a rank has, and in a cache's steps as well.

    Args:
        model: a GPTModel with rotary embedding of pairs (k, k + d/2). Scaling leaves the first pair as it is,
            except for linear scaling, which `stretch` undoes.
        windowed: which layers of the whole model have a window.
        base: of their rotary embedding, whose positions are not divided.
        stretch: `seq_len_interpolation_factor` of the model.
    """

    def turn(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs.get("rotary_pos_emb")
        if given is None:
            return args, kwargs
        both = given if isinstance(given, tuple) else (given,)
        turned = tuple(_angles(table, base, stretch) for table in both)
        return args, kwargs | {"rotary_pos_emb": turned if isinstance(given, tuple) else turned[0]}

    for layer in model.decoder.layers:
        if windowed[layer.layer_number - 1]:
            layer.register_forward_pre_hook(turn, with_kwargs=True)
            attention = layer.self_attention
            own = attention.config = copy.copy(attention.config)
            for name in [name for name in vars(own) if name.startswith("yarn_")]:
                delattr(own, name)  # by which attention would grow cosine and sine
            if hasattr(attention, YARN_FACTOR):
                setattr(attention, YARN_FACTOR, 1.0)


def _angles(table: Tensor, base: float, stretch: float) -> Tensor:
    """Angles [S, 1, 1, d] of the base; those of `table` tell the positions."""
    positions = (table[..., :1] * stretch).round()
    exponents = torch.arange(0, table.size(-1), 2, dtype=torch.float32, device=table.device)
    angles = positions * (1.0 / base ** (exponents / table.size(-1)))
    return torch.cat([angles, angles], dim=-1)
