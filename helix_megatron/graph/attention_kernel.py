"""Attention as one operator of the graph: a fused kernel, as a GPU has it.

Without a GPU torch would choose kernels for a CPU, or unfused products for head sizes that its kernels lack.
The operator here has shapes only, and never runs on data. It saves for the backward pass what FlashAttention
saves: queries, keys, values, output and one float32 per query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

# query [B, H, L, D], key [B, G, S, D], value [B, G, S, E] → output [B, H, L, E], log-sum-exp [B, H, L]; `pairs`
# is how many (query, key) pairs of a head are computed.
torch.library.define(
    "helix::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, int pairs) -> (Tensor, Tensor)",
)
torch.library.define(
    "helix::attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor log_sum_exp, int pairs) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("helix::attention")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pairs: int) -> Any:
    same = query.size(-1) == value.size(-1)
    output = torch.empty_like(query) if same else query.new_empty(*query.shape[:3], value.size(-1))
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("helix::attention_backward")
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    return tuple(map(torch.empty_like, (query, key, value)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, _, ctx.pairs = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    run = torch.ops.helix.attention_backward
    return *run(gradient, *ctx.saved_tensors, ctx.pairs), None, None


torch.library.register_autograd("helix::attention", _backward, setup_context=_save)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In the place of torch's function of this name. What causality hides is skipped, not computed."""
    queries, keys = query.size(-2), key.size(-2)
    lower_right = isinstance(attn_mask, CausalBias)
    pairs = queries * keys
    if is_causal or lower_right:
        # Of the last `queries` positions, query q sees all keys but the queries − 1 − q that follow it.
        pairs -= queries * (queries - 1) // 2
    mask = None if lower_right else attn_mask
    return torch.ops.helix.attention(query, key, value, mask, pairs)[0]
