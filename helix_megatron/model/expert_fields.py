"""What describes a mixture of experts: one field for each of Megatron's flags, under the flag's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helix_megatron.flags import setting
from helix_megatron.model.patterns import layer_pattern

# What a field decides: what the model computes and the shapes of its weights; or only how it is trained.
FUNCTION, TRAINING = "function", "training"
MIXTURE = "mixture of experts"  # the group of the flags


def _expert(default: Any, help_text: str, **facts: Any) -> Any:
    own: dict[str, Any] = {
        "decides": FUNCTION,
        "group": MIXTURE,
        "under": "experts",
        "megatron": True,
    }
    return setting(default, help_text, **own | facts)


@dataclass(frozen=True)
class ExpertFields:
    """The fields of `ModelFields` that count where a model has experts; their metadata is described there."""

    num_experts: int | None = _expert(
        None,
        "experts of every MoE layer; none makes a dense model",
        megatron="num_moe_experts",
        largest=10_000,
    )
    moe_layer_freq: int | tuple[int, ...] = _expert(
        1,
        "every n-th layer is an MoE layer; or a list with 1 for each that is, such as [0,1,1] or [0]+[1]*2",
        parse=layer_pattern,
    )
    moe_ffn_hidden_size: int | None = _expert(
        None, "hidden size of an expert; --ffn-hidden-size when not given", largest=10**8
    )
    moe_router_topk: int = _expert(2, "experts of a token", largest=10_000)
    moe_router_pre_softmax: bool = _expert(
        False, "weigh a token's experts by the softmax over all experts instead of over its own"
    )
    moe_router_score_function: str = _expert(
        "softmax", "what makes weights of a router's logits", choices=("softmax", "sigmoid")
    )
    moe_router_enable_expert_bias: bool = _expert(
        False, "choose experts by their scores plus a bias that balances them and weighs nothing"
    )
    moe_router_num_groups: int | None = _expert(
        None, "groups of experts, of which a token takes the best", largest=10_000
    )
    moe_router_group_topk: int | None = _expert(None, "groups of a token", largest=10_000)
    moe_router_groups_by_best: bool = _expert(
        False,
        "count a group of experts by its best one, as DeepSeek-V2 does, instead of by several",
        megatron=None,
    )
    moe_router_topk_scaling_factor: float | None = _expert(
        None, "multiply the weights of a token's experts by this", above=0
    )
    moe_router_dtype: str | None = _expert(
        None,
        "precision of the router; that of the weights when not given",
        choices=("fp32", "fp64"),
    )
    moe_apply_probs_on_input: bool = _expert(
        False, "multiply a token by its expert's weight before the expert instead of behind it"
    )
    moe_router_load_balancing_type: str = _expert(
        "aux_loss",
        "how experts are balanced",
        choices=("aux_loss", "seq_aux_loss", "none"),
        decides=TRAINING,
        inference=False,
    )
    moe_aux_loss_coeff: float = _expert(
        0.01, "weight of the load-balancing loss", decides=TRAINING, inference=False
    )
    moe_token_dispatcher_type: str = _expert(
        "alltoall",
        "how tokens reach their experts",
        choices=("allgather", "alltoall"),
        decides=None,
    )
    moe_shared_expert_intermediate_size: int | None = _expert(
        None, "hidden size of experts that all tokens share", largest=10**8
    )
    moe_latent_size: int | None = _expert(
        None,
        "dimensions that experts read and write, in layers of --hybrid-layer-pattern; the hidden size when not "
        "given",
        largest=10**7,
    )
    moe_shared_expert_gate: bool = _expert(
        False, "a gate of its own for the shared experts' output", under="shared experts"
    )
