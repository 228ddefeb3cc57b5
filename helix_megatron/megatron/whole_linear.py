"""A linear layer that is not cut, for machines without Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class WholeLinear(torch.nn.Module):
    """What Transformer Engine's `TELinear` is with `parallel_mode="duplicated"`: [.., D] → ([.., O], None).

    With sequence parallelism each rank sees a part of the tokens; the mark is that by which
    `finalize_model_grads` sums the weight's gradients.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        **others: Any,
    ) -> None:
        super().__init__()
        assert not bias, "experts with a latent have no biases"
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype)
        )
        init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None
