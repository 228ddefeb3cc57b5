"""Stacks of `HybridModel` from megatron-core's own modules, for machines without Transformer Engine.

Megatron's `hybrid_stack_spec` names Transformer Engine's layers only. The stack here builds the same layers,
with the same names in checkpoints, from what runs everywhere: attention (`*`), Mamba (`M`), gated delta nets
(`G`), MLP (`-`) and mixtures of experts (`E`).
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from helix_megatron.errors import setting_error
from helix_megatron.megatron import mamba
from helix_megatron.megatron.norms import use_available_norms, with_classes
from helix_megatron.megatron.specs import helix_spec
from helix_megatron.megatron.whole_linear import WholeLinear
from helix_megatron.patching import temporarily
from helix_megatron.run.config import RunConfig

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ModuleNotFoundError:  # their names before megatron-core 0.18
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules

_arguments = inspect.signature(HybridModel.__init__).parameters
PATTERN = next(
    name for name in ("hybrid_layer_pattern", "hybrid_override_pattern") if name in _arguments
)
RECOMPUTES = hasattr(sys.modules[HybridStack.__module__], "checkpointed_forward")

__all__ = [
    "HybridModel",
    "HybridStack",
    "HybridStackSubmodules",
    "build_hybrid",
    "local_stack_spec",
]


def build_hybrid(run: RunConfig, config: Any, *, use_engine: bool, **place: Any) -> Any:
    """A `HybridModel` of one pipeline stage with the layers of the run's pattern, weights not drawn.

    Raises:
        HelixError: whole layers are to be recomputed, and this megatron-core's stack does not.
    """
    if config.recompute_granularity == "full" and not RECOMPUTES:
        raise setting_error(
            "<recompute_granularity> full has no effect on layers of a <hybrid_layer_pattern> before "
            "megatron-core 0.18. Give selective, or leave it out."
        )
    if use_engine and config.qk_layernorm:
        raise setting_error(
            "<qk_layernorm> has no effect on Transformer Engine's layers of a <hybrid_layer_pattern>. Give "
            "<transformer_impl> local, or leave it out."
        )
    spec = helix_spec(engine_stack_spec() if use_engine else local_stack_spec(config), config.helix)
    pattern = {PATTERN: run.model.hybrid_layer_pattern}
    # megatron-core has experts with a latent for Transformer Engine alone, of which it takes a linear layer.
    own = {} if use_engine else {"HAVE_TE": True, "TELinear": WholeLinear}
    with temporarily(moe_layer, **own):
        model = HybridModel(config, spec, **run.model.hybrid_settings, **pattern, **place)
    mamba.limit_time_steps(model, run.model.mamba_time_step_min)
    return model


def engine_stack_spec() -> ModuleSpec:
    """Megatron's own stack, of Transformer Engine's layers; its Mamba layers run without mamba-ssm, too."""
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    except ModuleNotFoundError:  # before megatron-core 0.18
        from megatron.core.models.mamba.mamba_layer_specs import (
            mamba_stack_spec as hybrid_stack_spec,
        )
    return with_classes(hybrid_stack_spec, {mamba.mixers.MambaMixer: mamba.Mamba})


def local_stack_spec(config: Any) -> ModuleSpec:
    """The stack for a transformer configuration; `helix_spec` replaces its attention as in any other.

    Gated delta nets need `deterministic_mode`, which is their path in plain torch.
    """
    parts = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    ).submodules
    experts = get_gpt_layer_local_spec(num_experts=config.num_moe_experts or 1).submodules.mlp
    delta_net = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear,
            out_norm=parts.input_layernorm,
            out_proj=RowParallelLinear,
        ),
    )

    def attention(self_attention: ModuleSpec, fused: str) -> ModuleSpec:
        submodules = TransformerLayerSubmodules(
            input_layernorm=parts.input_layernorm,
            self_attention=self_attention,
            self_attn_bda=parts.self_attn_bda,
            sharded_state_dict_keys_map={"input_layernorm.": f"self_attention.{fused}.layer_norm_"},
        )
        return ModuleSpec(module=TransformerLayer, submodules=submodules)

    def feed_forward(module: type, mlp: Any, renamed: dict[str, str]) -> ModuleSpec:
        submodules = TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.pre_mlp_layernorm,
            mlp=mlp,
            mlp_bda=parts.mlp_bda,
            sharded_state_dict_keys_map=renamed,
        )
        return ModuleSpec(module=module, submodules=submodules)

    mixer = ModuleSpec(
        module=mamba.Mamba,
        submodules=mamba.mixers.MambaMixerSubmodules(
            in_proj=ColumnParallelLinear, out_proj=RowParallelLinear
        ),
    )
    mamba_layer = MambaLayerSubmodules(
        norm=mamba.LayerNorm,
        mixer=mixer,
        mamba_bda=parts.self_attn_bda,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    layers = {
        "attention_layer": attention(parts.self_attention, "linear_qkv"),
        "gdn_layer": attention(delta_net, "in_proj"),
        "mlp_layer": feed_forward(
            MLPLayer, parts.mlp, {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
        ),
        "moe_layer": feed_forward(TransformerLayer, experts, {}),
        "mamba_layer": ModuleSpec(module=MambaLayer, submodules=mamba_layer),
    }
    known = {field.name for field in dataclasses.fields(HybridStackSubmodules)}
    submodules = HybridStackSubmodules(**{n: spec for n, spec in layers.items() if n in known})
    return use_available_norms(ModuleSpec(module=HybridStack, submodules=submodules))
