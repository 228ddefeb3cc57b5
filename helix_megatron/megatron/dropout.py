"""Hidden dropout that is the same at every layout.

Megatron draws hidden dropout from running random states, which differ with tensor and pipeline parallel rank
and with sequence parallelism. Here a mask is a function of (micro-batch, layer, place), drawn for the whole
sequence; under sequence parallelism each rank keeps its part. Recomputed forward passes find the same mask, see
`random.enter_micro_batch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helix_megatron.megatron.random import derive_seed, micro_batch_seed

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class LayoutFreeDropout(nn.Module):
    """Dropout of hidden states [S, B, D], or of this rank's part [S/p, B, D] under sequence parallelism.

    Args:
        probability: of dropping an element.
        place: what tells this dropout from all others of the model, such as (layer number, "mlp").
        group: the tensor parallel group if its ranks hold parts of the sequence, else None.
    """

    def __init__(
        self, probability: float, place: tuple[Any, ...], group: ProcessGroup | None
    ) -> None:
        super().__init__()
        self.probability, self.place, self.group = probability, place, group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        ranks, rank = (self.group.size(), self.group.rank()) if self.group else (1, 0)
        generator = torch.Generator(device=x.device)
        generator.manual_seed(derive_seed(micro_batch_seed(), self.place))
        whole = torch.empty((x.size(0) * ranks, *x.shape[1:]), device=x.device)
        kept = whole.bernoulli_(1.0 - self.probability, generator=generator)
        kept = kept[rank * x.size(0) : (rank + 1) * x.size(0)]
        return x * (kept / (1.0 - self.probability)).to(x.dtype)


def use_layout_free_dropout(model: nn.Module, config: Any) -> None:
    """Replace the hidden dropouts of a GPT model chunk: embedding, attention and MLP outputs.

    Does nothing where `hidden_dropout` is 0: Megatron's fused bias-dropout-add stays.
    """
    if config.hidden_dropout == 0.0:
        return
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            group = module.tp_group if config.sequence_parallel else None
            for place in ("self_attn_bda", "mlp_bda"):
                dropout = LayoutFreeDropout(
                    config.hidden_dropout, (module.layer_number, place), group
                )
                setattr(module, place, functools.partial(_bias_dropout_add, dropout))
        elif isinstance(module, LanguageModelEmbedding):
            group = module.tp_group if config.sequence_parallel else None
            module.embedding_dropout = LayoutFreeDropout(
                config.hidden_dropout, ("embedding",), group
            )


def _bias_dropout_add(dropout: LayoutFreeDropout, training: bool, fused: bool) -> BiasDropoutAdd:
    """In the place of Megatron's `get_bias_dropout_add`."""

    def apply(
        x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
    ) -> Tensor:
        x, bias = x_with_bias
        x = x if bias is None else x + bias
        return residual.to(x.dtype) + dropout.train(training)(x)

    return apply
