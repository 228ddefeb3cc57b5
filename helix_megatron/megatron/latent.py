"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434): megatron-core's, with plain tensor parallelism."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from helix_megatron.megatron.delta_net import sum_over_ranks
from helix_megatron.megatron.norms import TorchNorm, with_classes

PROJECTIONS = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
NORMS = ("q_layernorm", "kv_layernorm")
# Transformer Engine's names, which checkpoints have.
NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class LatentCore(DotProductAttention):
    """megatron-core's; `config.kv_channels` are the dimensions of values, and the scale is given.

    Its latent attention tells it the dimensions of keys and values, which only Transformer Engine's takes.
    """

    def __init__(
        self,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)


class LatentAttention(MLASelfAttention):
    """megatron-core's layer, [S, B, D] → [S, B, D], with the gradients of one rank on several.

    Every rank's heads use the one rotated key, so that its gradient is a sum over ranks. megatron-core forms it
    with sequence parallelism and Transformer Engine's layers only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_kv_down_proj.register_forward_hook(self._whole_latents)
        epsilon = getattr(self.config, "latent_norm_epsilon", None)
        for name in (*NORMS, *PROJECTIONS[1:]):  # which Transformer Engine's fuse into these
            if epsilon is not None and hasattr(getattr(self, name, None), "eps"):
                getattr(self, name).eps = epsilon
        norm, ranks = getattr(self, "q_layernorm", None), self.config.tensor_model_parallel_size
        if isinstance(norm, TorchNorm) and not self.config.sequence_parallel:
            # Megatron sums gradients of what is called q_layernorm over ranks, and each has the whole here.
            norm.weight.register_hook(lambda gradient: gradient / ranks)

    def _whole_latents(
        self, module: Any, inputs: Any, output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any]:
        """[S, B, (L + R)/tp] → [S, B, L + R]: the latent, and the key that is rotated."""
        joined, bias = output
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        if joined.shape[-1] != sum(sizes):
            joined = gather_from_tensor_model_parallel_region(joined, group=self.tp_group)
            if self.config.sequence_parallel:
                joined = scatter_to_sequence_parallel_region(joined, group=self.tp_group)
        if joined.requires_grad and not self.config.sequence_parallel:
            latent, rotated = joined.split(sizes, -1)
            rotated.register_hook(sum_over_ranks)
            joined = torch.cat([latent, rotated], -1)
        return joined, bias

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """What the spec names; megatron-core 0.19 refuses queries without a latent in its own layers."""
        return {name: getattr(submodules, name) for name in (*PROJECTIONS, *NORMS)}


def with_whole_latents(spec: Any) -> Any:
    """A block spec of layers with latent attention in which that is `LatentAttention`; the given one stays."""
    spec = with_classes(spec, {MLASelfAttention: LatentAttention, DotProductAttention: LatentCore})

    def named(layer: Any) -> Any:
        names = {"sharded_state_dict_keys_map": NAMES}
        return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, **names))

    return dataclasses.replace(spec, layer_specs=[named(layer) for layer in spec.layer_specs])
