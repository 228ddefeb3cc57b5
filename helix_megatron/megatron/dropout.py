"""Hidden dropout that is the same at every layout.

Megatron draws hidden dropout from running random states, which differ with tensor and pipeline parallel rank
and with sequence parallelism. Here a mask is a function of (micro-batch, layer, place), drawn for the whole
sequence; under context and sequence parallelism each rank keeps its part. Recomputed forward passes find the
same mask, see `random.enter_micro_batch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helix_megatron.megatron.context_parallel import own_part
from helix_megatron.megatron.random import derive_seed, micro_batch_seed

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class LayoutFreeDropout(nn.Module):
    """Dropout of hidden states [S, B, D], or of this rank's part [S/(c·p), B, D].

    Args:
        probability: of dropping an element.
        place: what tells this dropout from all others of the model, such as (layer number, "mlp").
        context: the context-parallel group.
        group: the tensor parallel group if its ranks hold parts of the sequence, else None.
    """

    def __init__(
        self,
        probability: float,
        place: tuple[Any, ...],
        context: ProcessGroup,
        group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.probability, self.place = probability, place
        self.context, self.group = context, group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        ranks, rank = (self.group.size(), self.group.rank()) if self.group else (1, 0)
        length = x.size(0) * ranks * self.context.size()
        generator = torch.Generator(device=x.device)
        generator.manual_seed(derive_seed(micro_batch_seed(), self.place))
        whole = torch.empty((length, *x.shape[1:]), device=x.device)
        kept = whole.bernoulli_(1.0 - self.probability, generator=generator)
        kept = own_part(kept, 0, self.context.rank(), self.context.size())
        kept = kept[rank * x.size(0) : (rank + 1) * x.size(0)]
        return x * (kept / (1.0 - self.probability)).to(x.dtype)


def use_layout_free_dropout(model: nn.Module, config: Any) -> None:
    """Replace the hidden dropouts of a GPT model chunk: embedding, attention and MLP outputs.

    Does nothing where `hidden_dropout` is 0: Megatron's fused bias-dropout-add stays.
    """
    if config.hidden_dropout == 0.0:
        return
    context = parallel_state.get_context_parallel_group()

    def dropout(module: Any, *place: Any) -> LayoutFreeDropout:
        group = module.tp_group if config.sequence_parallel else None
        return LayoutFreeDropout(config.hidden_dropout, place, context, group)

    for module in model.modules():
        if isinstance(module, TransformerLayer):
            for place in ("self_attn_bda", "mlp_bda"):
                own = dropout(module, module.layer_number, place)
                setattr(module, place, functools.partial(_bias_dropout_add, own))
        elif isinstance(module, LanguageModelEmbedding):
            module.embedding_dropout = dropout(module, "embedding")


def _bias_dropout_add(dropout: LayoutFreeDropout, training: bool, fused: bool) -> BiasDropoutAdd:
    """In the place of Megatron's `get_bias_dropout_add`."""

    def apply(
        x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
    ) -> Tensor:
        x, bias = x_with_bias
        x = x if bias is None else x + bias
        return residual.to(x.dtype) + dropout.train(training)(x)

    return apply
