"""The model families that can be cut, and what their modules are called.

All are decoders whose attention has separate `q_proj`, `k_proj`, `v_proj`, `o_proj`, rotates whole heads with
rotary pairs (k, k + d/2), and whose MLPs are gated: `gate_proj`, `up_proj`, `down_proj`, or experts stacked as
`gate_up_proj` [E, 2·I, D] and `down_proj` [E, D, I].
"""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.errors import HelixError, listed


@dataclass(frozen=True)
class ExpertFiles:
    """How checkpoint files name an expert's weights, which the library keeps stacked in the model.

    `MODULE.experts.E.NAME.weight`, where MODULE is the model's own name with `.mlp.` read as `block`.
    """

    gate: str
    up: str
    down: str
    block: str = ".mlp."


@dataclass(frozen=True)
class Family:
    """prefix: of the class names, as in `LlamaAttention`; experts: None for a dense family."""

    prefix: str
    experts: ExpertFiles | None = None

    @property
    def attention(self) -> str:
        return f"{self.prefix}Attention"

    @property
    def mlp(self) -> str:
        return f"{self.prefix}MLP"

    @property
    def stacked_experts(self) -> str:
        return f"{self.prefix}Experts"


_QWEN_EXPERTS = ExpertFiles("gate_proj", "up_proj", "down_proj")

FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3"),
    "gemma": Family("Gemma"),
    "mixtral": Family("Mixtral", ExpertFiles("w1", "w3", "w2", block=".block_sparse_moe.")),
    "qwen2_moe": Family("Qwen2Moe", _QWEN_EXPERTS),
    "qwen3_moe": Family("Qwen3Moe", _QWEN_EXPERTS),
}


def family_of(model_type: object) -> Family:
    """The family of a configuration's `model_type`.

    Raises:
        HelixError: it is not one of `FAMILIES`.
    """
    if model_type not in FAMILIES:
        raise HelixError(
            f"models of type {model_type!r} cannot be cut. Valid model types: {listed(FAMILIES)}."
        )
    return FAMILIES[str(model_type)]
