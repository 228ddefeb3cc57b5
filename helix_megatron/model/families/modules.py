"""What the modules of a family are called in `transformers`, for models that are cut in place.

Such a family has decoders whose attention has separate `q_proj`, `k_proj`, `v_proj`, `o_proj` and rotates whole
heads with rotary pairs (k, k + d/2), and MLPs that are gated: `gate_proj`, `up_proj`, `down_proj`, or experts
stacked as `gate_up_proj` [E, 2·I, D] and `down_proj` [E, D, I].
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Modules:
    """prefix: of the class names, as in `LlamaAttention`."""

    prefix: str

    @property
    def attention(self) -> str:
        return f"{self.prefix}Attention"

    @property
    def mlp(self) -> str:
        return f"{self.prefix}MLP"
