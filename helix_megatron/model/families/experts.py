"""Mixture of experts in `config.json`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from helix_megatron.errors import HelixError
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.pieces import Config, Piece, needed


@dataclass(frozen=True)
class Experts(Piece):
    """Number and size of experts, how a token chooses them, and which layers have them.

    Args:
        number: keys of the number of experts, in the spellings of transformers 5 and 4; all are written.
        size: key of an expert's hidden size.
        default_number, default_topk: when the keys are absent.
        dense_layers: the family may have layers without experts, and says whether the weights of a token's
            experts are normalised (norm_topk_prob). Without it all layers have experts, and they are.
        normalised: `norm_topk_prob` when it is absent.
        shared_size: hidden size of the shared expert when its key is absent; None for a family without one.

    Softmax over all experts, of which the best k are taken and normalised, is Megatron's softmax over the
    best k; without normalisation it is `moe_router_pre_softmax`.
    """

    number: tuple[str, ...]
    size: str
    default_number: int
    default_topk: int
    dense_layers: bool = True
    normalised: bool = False
    shared_size: int | None = None

    def __post_init__(self) -> None:
        keys = (*self.number, self.size, "num_experts_per_tok")
        if self.dense_layers:
            keys += ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
        if self.shared_size is not None:
            keys += ("shared_expert_intermediate_size",)
        object.__setattr__(self, "keys", keys)
        fields = dict.fromkeys(self.number, "num_experts") | {
            self.size: "moe_ffn_hidden_size",
            "num_experts_per_tok": "moe_router_topk",
            "norm_topk_prob": "moe_router_pre_softmax",
            "decoder_sparse_step": "num_layers",
            "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
        }
        object.__setattr__(self, "fields", {key: fields[key] for key in keys if key in fields})

    def flags(self, config: Config) -> dict[str, Any]:
        number = next((config[key] for key in self.number if config.get(key)), None)
        if number is None and any(key in config for key in self.number):
            raise HelixError(
                f"config.json has {self.number[0]} = 0: a model without experts is of the dense family."
            )
        topk = needed(config, "num_experts_per_tok", self.default_topk)
        normalised = not self.dense_layers or config.get("norm_topk_prob", self.normalised)
        if normalised and topk == 1:
            raise HelixError(
                "config.json has num_experts_per_tok = 1 with normalised weights, which are then always 1; "
                "Megatron's router does not have this."
            )
        flags = {
            "num_experts": number or self.default_number,
            "moe_ffn_hidden_size": needed(config, self.size),
            "moe_router_topk": topk,
            "moe_router_pre_softmax": not normalised,
            "moe_layer_freq": self._layers(config),
            "moe_shared_expert_intermediate_size": None,
            "moe_shared_expert_gate": False,
        }
        if not self.dense_layers:
            flags["ffn_hidden_size"] = flags["moe_ffn_hidden_size"]
        if self.shared_size is not None:
            flags["moe_shared_expert_gate"] = True
            flags["moe_shared_expert_intermediate_size"] = needed(
                config, "shared_expert_intermediate_size", self.shared_size
            )
        return flags

    def _layers(self, config: Config) -> int | list[int]:
        """Hugging Face gives experts to every n-th layer, counted from one; Megatron counts from zero."""
        if not self.dense_layers:
            return 1
        step, dense = needed(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
        layers = range(needed(config, "num_hidden_layers"))
        if not isinstance(dense, list | tuple) or not all(type(layer) is int for layer in dense):
            raise HelixError(
                f"config.json sets mlp_only_layers = {dense!r:.80}. It must be a list of whole numbers."
            )
        dense = frozenset(dense)
        chosen = [int(k not in dense and (k + 1) % step == 0) for k in layers]
        if not any(chosen):
            raise HelixError(
                f"config.json gives experts to none of {len(layers)} layers (decoder_sparse_step = {step}, "
                f"mlp_only_layers = {sorted(dense)}): a model without experts is of the dense family."
            )
        return 1 if all(chosen) else chosen

    def config(self, model: ModelConfig) -> dict[str, Any]:
        if model.num_experts is None:  # a dense model: valid, and then found to differ from it
            model = dataclasses.replace(
                model, num_experts=self.default_number, moe_router_topk=self.default_topk
            )
        written: dict[str, Any] = {
            **dict.fromkeys(self.number, model.num_experts),
            self.size: model.moe_ffn_hidden_size,
            "num_experts_per_tok": model.moe_router_topk,
        }
        if self.dense_layers:
            dense = [k for k, experts in enumerate(model.moe_layers) if not experts]
            written |= {
                "norm_topk_prob": not model.moe_router_pre_softmax,
                "decoder_sparse_step": 1,
                "mlp_only_layers": dense,
            }
        if self.shared_size is not None:
            shared = model.moe_shared_expert_intermediate_size
            written["shared_expert_intermediate_size"] = shared
        return written


@dataclass(frozen=True)
class BalancedExperts(Piece):
    """Experts behind some dense layers, chosen by sigmoids and a bias that balances them, beside shared ones.

    As DeepSeek-V3 and its relatives have them (arXiv 2412.19437): a group of experts counts by its two best,
    the weights of a token's experts are normalised, and then multiplied by `routed_scaling_factor`.

    Args:
        number, topk, scaling, dense, groups, shared: when the keys are absent; `groups` are n_group and
            topk_group.
    """

    number: int
    topk: int
    scaling: float
    dense: int
    groups: tuple[int, int] = (1, 1)
    shared: int = 1
    keys: tuple[str, ...] = (
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_shared_experts",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "norm_topk_prob",
    )
    fields: ClassVar = {
        "n_routed_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "n_shared_experts": "num_experts",
        "routed_scaling_factor": "moe_router_topk_scaling_factor",
        "n_group": "moe_router_num_groups",
        "topk_group": "moe_router_group_topk",
        "first_k_dense_replace": "window_size",  # a whole number, or none
        "norm_topk_prob": "moe_router_pre_softmax",  # true or false
    }

    def flags(self, config: Config) -> dict[str, Any]:
        layers, topk = (
            needed(config, "num_hidden_layers"),
            needed(config, "num_experts_per_tok", self.topk),
        )
        dense = min(needed(config, "first_k_dense_replace", self.dense), layers)
        if dense == layers:
            raise HelixError(
                f"config.json sets first_k_dense_replace = {dense}, which gives experts to none of {layers} "
                "layers."
            )
        size = needed(config, "moe_intermediate_size")
        return {
            "num_experts": needed(config, "n_routed_experts", self.number),
            "moe_router_topk": topk,
            "moe_ffn_hidden_size": size,
            "moe_layer_freq": [int(layer >= dense) for layer in range(layers)] if dense else 1,
            "moe_shared_expert_intermediate_size": size
            * needed(config, "n_shared_experts", self.shared),
            "moe_shared_expert_gate": False,
            "moe_router_topk_scaling_factor": float(
                needed(config, "routed_scaling_factor", self.scaling)
            ),
            "moe_router_dtype": "fp32",
            **self._scores(config, topk),
            **self._groups(config, topk),
        }

    def _scores(self, config: Config, topk: int) -> dict[str, Any]:
        if not needed(config, "norm_topk_prob", True) or topk == 1:
            raise HelixError(
                f"config.json sets norm_topk_prob = {config.get('norm_topk_prob', True)} and "
                f"num_experts_per_tok = {topk}. Megatron's router normalises the sigmoids of a token's "
                "experts, and of one expert it does not. Valid: true, with 2 experts or more."
            )
        return {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}

    def _groups(self, config: Config, topk: int) -> dict[str, Any]:
        groups, chosen = (
            needed(config, key, default)
            for key, default in zip(("n_group", "topk_group"), self.groups, strict=True)
        )
        if groups == chosen:
            return {"moe_router_num_groups": None, "moe_router_group_topk": None}
        if topk // chosen != 2:
            raise HelixError(
                f"config.json sets n_group = {groups}, topk_group = {chosen} and num_experts_per_tok = {topk}. "
                f"Megatron's router counts a group by its {topk // chosen} best, and these models by 2. Valid: "
                "num_experts_per_tok twice topk_group, or topk_group = n_group."
            )
        return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        if model.num_experts is None:  # a dense model: valid, and then found to differ from it
            model = dataclasses.replace(model, num_experts=self.number, moe_router_topk=self.topk)
        size = model.moe_ffn_hidden_size or 1
        shared = model.moe_shared_expert_intermediate_size or size
        return {
            "n_routed_experts": model.num_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "moe_intermediate_size": size,
            "n_shared_experts": max(1, shared // size),
            "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
            "n_group": model.moe_router_num_groups or 1,
            "topk_group": model.moe_router_group_topk or 1,
            "first_k_dense_replace": model.moe_layers.index(True),
            "norm_topk_prob": True,
        }


LIMITED = "group_limited_greedy"


@dataclass(frozen=True)
class SoftmaxExperts(BalancedExperts):
    """Such experts, chosen and weighed by a softmax over all, as in DeepSeek-V2 (arXiv 2405.04434).

    With topk_method greedy of all experts (V2-Lite), else of the groups with the best one each.
    """

    keys: tuple[str, ...] = (*BalancedExperts.keys, "topk_method")

    def _scores(self, config: Config, topk: int) -> dict[str, Any]:
        if needed(config, "norm_topk_prob", False):
            raise HelixError(
                "config.json sets norm_topk_prob = True, which transformers does not read in these models. Set "
                "it to false if its logits are the model's."
            )
        return {"moe_router_pre_softmax": True}

    def _groups(self, config: Config, topk: int) -> dict[str, Any]:
        method = needed(config, "topk_method", "greedy")
        if method not in ("greedy", LIMITED):
            raise HelixError(
                f"config.json sets topk_method = {method!r:.80}. Valid: greedy, {LIMITED}."
            )
        groups = (
            (needed(config, "n_group"), needed(config, "topk_group"))
            if method == LIMITED
            else (None, None)
        )
        return {
            "moe_router_num_groups": groups[0],
            "moe_router_group_topk": groups[1],
            "moe_router_groups_by_best": method == LIMITED,
        }

    def config(self, model: ModelConfig) -> dict[str, Any]:
        method = LIMITED if model.moe_router_num_groups else "greedy"
        return super().config(model) | {"norm_topk_prob": False, "topk_method": method}
