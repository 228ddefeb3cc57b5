"""A model as the planner sees it: a `ModelConfig` from a preset, a config.json or flags, and its counts."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.catalog import Cut, layer_tensors, mlp_tensors
from helix_megatron.checkpoint.foreign import read_json
from helix_megatron.errors import HelixError, did_you_mean, listed
from helix_megatron.flags import flag_of
from helix_megatron.model.description import MODEL_FLAGS, SIZES, ModelConfig, padded_rows
from helix_megatron.model.fields import add_model_flags
from helix_megatron.model.packing import KEY as PACKED
from helix_megatron.model.packing import packing_of
from helix_megatron.plan.mixers import ORDINARY, Latent, Special, gated_delta_net
from helix_megatron.plan.outlines import outline_of, text_config
from helix_megatron.plan.presets import PRESETS
from helix_megatron.plan.published_sizes import CONFIGS

NAMES = (*PRESETS, *CONFIGS)
VOCABULARY = 51200  # of a model whose flags name none: GPT-2's, padded


@dataclass(frozen=True, eq=False)
class ModelSpec(ModelConfig):
    """A model with its name, the flags that made it (for commands), the source of its sizes, and its counts."""

    name: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    special: Special = ORDINARY
    attention_layers: int = field(init=False)  # with softmax attention, windows included
    windows: int = field(init=False)  # how many of them have a sliding window
    expert_width: int = field(init=False)  # of what experts read and write
    width: int = field(init=False)  # dimensions of all query heads, h·d
    norm_tensors: int = field(init=False)  # of one norm: a weight, and LayerNorm's bias
    norms_queries: bool = field(init=False)
    fc1_factor: int = field(init=False)  # rows of linear_fc1 per row of activations: 2 with a gate
    ffn: int = field(init=False)
    experts: int = field(init=False)
    moe_ffn: int = field(init=False)
    shared_ffn: int = field(init=False)
    expert_layers: int = field(init=False)
    dense_layers: int = field(init=False)
    learned_positions: int = field(init=False)
    embeddings: int = field(init=False)  # 1 where the output layer has that of the input

    __hash__, __eq__ = object.__hash__, object.__eq__  # asked for thousands of times

    def __post_init__(self) -> None:
        super().__post_init__()
        learned = self.position_embedding_type == "learned_absolute"
        shared = self.moe_shared_expert_intermediate_size if self.num_experts else None
        special, layers = self.special, self.num_layers
        attention = layers - special.linear_layers * (not special.beside)
        if special.separate:
            attention = special.attention_layers
        mlps = layers - special.linear_layers - attention if special.separate else layers
        for name, count in {
            "width": self.num_attention_heads * self.head_dim,
            "norm_tensors": 1 if self.normalization == "RMSNorm" else 2,
            "norms_queries": self.qk_layernorm or self.qk_l2_norm,
            "fc1_factor": 2 if self.is_gated else 1,
            "ffn": self.ffn_hidden_size,
            "experts": self.num_experts or 0,
            "moe_ffn": self.moe_ffn_hidden_size or 0,
            "shared_ffn": shared or 0,
            "expert_layers": sum(self.moe_layers),
            "dense_layers": mlps - sum(self.moe_layers),
            "attention_layers": attention,
            "windows": round(attention * sum(self.windowed_layers) / layers),
            "expert_width": special.expert_width or self.hidden_size,
            "learned_positions": self.max_position_embeddings if learned else 0,
            "embeddings": 2 if self.untie_embeddings_and_output_weights else 1,
        }.items():
            self._set(name, count)

    # -------------------------------------------------------------- parameters

    @functools.cached_property
    def norm_parameters(self) -> int:
        """Of one norm of the hidden states."""
        return self.hidden_size * self.norm_tensors

    @functools.cached_property
    def _layer_parameters(self) -> dict[str, list[int]]:
        """Of the parts of a layer, each with its norm: parameters that tensor parallelism cuts, and those that
        every rank holds whole."""
        counts = {part: [0, 0] for part in ("attention", "qk norms", "mlp", "router")}
        for moe in (False, True) if self.experts else (False,):
            for suffix, shape, cut in layer_tensors(self, moe):
                of_heads = suffix.rpartition(".")[0].endswith(("q_layernorm", "k_layernorm"))
                part = "qk norms" if of_heads else "attention"
                if suffix.startswith("mlp."):
                    part = "router" if moe else "mlp"
                elif moe:
                    continue  # attention is that of any layer
                counts[part][cut is Cut.REPLICATED] += math.prod(shape)
        if self.special.latent:
            own = self.special.latent.parameters(self.hidden_size, self.num_attention_heads)
            counts["attention"] = [own[0], own[1] + self.norm_parameters]
        if self.special.values_are_keys:
            counts["attention"][0] -= self.num_query_groups * self.head_dim * self.hidden_size
        if self.special.expert_width:
            counts["router"][1] += 2 * self.hidden_size * self.special.expert_width
        return counts

    @functools.cached_property
    def local_model(self) -> ModelSpec:
        """The model whose attention the layers with a window have."""
        if self.special.local is None:
            return self
        groups, dims = self.special.local
        others = {"num_query_groups": groups, "kv_channels": dims, "special": ORDINARY}
        return dataclasses.replace(self, **others)  # type: ignore[arg-type]

    def _on_rank(self, part: str, tensor_parallel: int) -> float:
        cut, whole = self._layer_parameters[part]
        return cut / tensor_parallel + whole

    def attention_parameters(self, tensor_parallel: int = 1) -> float:
        """Of an average layer's attention with its norm, on one of so many tensor parallel ranks."""

        def of(model: ModelSpec) -> float:
            return sum(model._on_rank(part, tensor_parallel) for part in ("attention", "qk norms"))

        found = (self.attention_layers - self.windows) * of(self)
        found += self.windows * of(self.local_model)
        if self.special.linear:
            linear, own_norm = self.special.linear, not self.special.beside
            own = linear.parameters(self.hidden_size, tensor_parallel)
            found += self.special.linear_layers * (own + own_norm * self.norm_parameters)
        return found / self.num_layers

    def mlp_parameters(self, tensor_parallel: int = 1) -> float:
        """Of one dense layer's MLP with its norm."""
        return self._on_rank("mlp", tensor_parallel)

    def router_parameters(self, tensor_parallel: int = 1) -> float:
        """Of one MoE layer outside its experts: norm, router, shared experts."""
        return self._on_rank("router", tensor_parallel)

    @functools.cached_property
    def expert_parameters(self) -> float:
        """Of one expert."""
        if self.special.expert_width:
            return self.special.expert_width * self.moe_ffn * (self.fc1_factor + 1)
        return sum(math.prod(shape) for _, shape, _ in mlp_tensors(self, self.moe_ffn))

    def replicated_parameters(self, experts_here: float = 0.0) -> float:
        """Of all layers, those that every tensor parallel rank holds whole: norms, biases of row-parallel
        linears and of the experts here, routers. With sequence parallelism their gradients are summed."""
        attention, _, mlp, router = (whole for _, whole in self._layer_parameters.values())
        bias = 0 if self.disable_bias_linear else self.hidden_size
        expert = attention + router + bias * experts_here
        return self.dense_layers * (attention + mlp) + self.expert_layers * expert

    @functools.cached_property
    def parameters(self) -> float:
        """All of them."""
        layers = self.num_layers * self.attention_parameters()
        layers += self.dense_layers * self.mlp_parameters()
        of_experts = self.experts * self.expert_parameters
        layers += self.expert_layers * (self.router_parameters() + of_experts)
        embeddings = self.padded_vocab(1, 1) * self.embeddings + self.learned_positions
        return layers + embeddings * self.hidden_size + self.norm_parameters

    @functools.cached_property
    def active_parameters(self) -> float:
        """Those that one token passes through."""
        idle = self.experts - self.moe_router_topk
        return self.parameters - self.expert_layers * idle * self.expert_parameters

    def padded_vocab(self, tensor_parallel: int, unit: int = 128) -> int:
        """The vocabulary, padded as the training script pads it."""
        return padded_rows(self.padded_vocab_size or 0, unit, tensor_parallel)

    def flops_per_token(self, sequence: int) -> float:
        """Model FLOPs of a token in training, without recomputation: 6 per weight used, and attention."""
        if self.special != ORDINARY:
            looked_up = self.padded_vocab(1, 1) * (self.embeddings - 1) * self.hidden_size
            full = (self.attention_layers - self.windows) * self.attended(sequence)
            seen = min(sequence, 2 * (self.window_size or sequence))
            windowed = self.windows * self.local_model.attended(seen)
            scan = self.special.linear.scan_flops if self.special.linear else 0.0
            pairs = full + windowed + self.special.linear_layers * scan
            return 6 * (self.active_parameters - looked_up) + 3 * pairs
        weights = self.num_layers * (self.qkv_rows + self.width)
        weights += self.dense_layers * self.ffn * (self.fc1_factor + 1)
        per_token = self.moe_ffn * self.moe_router_topk + self.shared_ffn
        weights += self.expert_layers * (per_token * (self.fc1_factor + 1) + self.experts)
        weights += self.padded_vocab(1, 1)
        attention = 4 * self.num_layers * self.width * sequence / 2  # causal
        return 6 * weights * self.hidden_size + 3 * attention

    def attended(self, sequence: float) -> float:
        """FLOPs of a token's scores and values in one layer, forward, under a causal mask."""
        latent = self.special.latent
        dims = latent.key + latent.value if latent else 2 * self.head_dim
        return self.num_attention_heads * dims * sequence


def model_of(text: str) -> ModelSpec:
    """A preset, a config.json (or the directory that holds it), or Megatron flags in one string.

    Raises:
        HelixError: none of them; or a file or flags that describe no model.
    """
    if text.lower() in PRESETS:
        flags, source = PRESETS[text.lower()]
        return spec_of_flags(text.lower(), flags, source)
    if text.lower() in CONFIGS:
        return spec_of_config(text.lower(), CONFIGS[text.lower()], "config.json on huggingface.co")
    if text.lstrip().startswith("--"):
        try:
            return model_of_arguments(shlex.split(text))
        except ValueError as error:
            raise HelixError(f"--model {text!r} cannot be split into flags: {error}.") from error
    path = Path(text)
    if path.is_dir():
        path /= "config.json"
    if path.suffix == ".json" or path.exists():
        return read_config(path)
    raise HelixError(
        f"model {text!r} is no preset and no config.json. Presets: {listed(NAMES)}. Or give the path of a "
        "config.json, or Megatron flags (--num-layers, --hidden-size, --num-attention-heads, …).",
        remedy=did_you_mean(text.lower(), NAMES),
    )


def read_config(path: Path) -> ModelSpec:
    """A model from Hugging Face's config.json.

    Raises:
        HelixError: unreadable, of an unknown family, or with settings that its family here does not have.
    """
    try:
        config = read_json(path)
    except HelixError as error:
        raise HelixError(f"cannot read model file {error}") from error
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    try:
        return spec_of_config(name, config, str(path))
    except HelixError as error:
        raise HelixError(f"model file {path}: {error}") from error


def spec_of_config(name: str, config: Mapping[str, Any], source: str) -> ModelSpec:
    """A model from the content of a config.json: by its outline, or as the conversion reads it.

    Raises:
        HelixError: of an unknown family, or with settings that its family here does not have.
    """
    from helix_megatron.model.families import family_of

    try:
        packing = packing_of(config)
    except HelixError as error:
        warnings.warn(f"{error} Its weights are counted in bf16.", stacklevel=2)
    else:
        if packing is not None:
            warnings.warn(
                f"config.json says that files keep its weights in {packing}. They are unpacked when they are "
                "read, and counted so, in bf16 where no other precision is asked for.",
                stacklevel=2,
            )
    config = {key: value for key, value in text_config(config).items() if key != PACKED}
    outline = outline_of(config)
    if outline is None:
        outline = family_of(config).model_flags(config), ORDINARY
    spec = spec_of_flags(name, outline[0], source)
    return spec if outline[1] == ORDINARY else dataclasses.replace(spec, special=outline[1])


def model_of_arguments(arguments: Sequence[str]) -> ModelSpec:
    """A model from Megatron flags: those of the training script.

    Raises:
        HelixError: flags that the training script does not have, or sizes missing.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise HelixError(
                f"model flags: {message}. Valid: the model flags of pretrain_gpt.py --help."
            )

    parser = Parser(add_help=False, allow_abbrev=False)
    add_model_flags(parser, defaults=False)
    args, rest = parser.parse_known_args(list(arguments))
    if rest:
        raise HelixError(
            f"{rest[0]!r} is no flag of helix plan and no model flag.",
            remedy=did_you_mean(rest[0].split("=")[0], map(flag_of, MODEL_FLAGS)),
        )
    flags = {"vocab_size": VOCABULARY} | vars(args)
    flags.pop("seq_length", None)
    for name in SIZES:
        if name not in flags:
            raise HelixError(
                f"a model from Megatron flags needs {flag_of(name)}. Or name one with --model."
            )
    return spec_of_flags("megatron-flags", flags, "command line")


def spec_of_flags(name: str, flags: Mapping[str, Any], source: str) -> ModelSpec:
    """A model from its flags by their destination names.

    Raises:
        HelixError: sizes that are missing or impossible.
    """
    try:
        model = ModelSpec.from_flags(flags)
    except HelixError as error:
        raise HelixError(f"model {name}: {error}") from error
    if model.padded_vocab_size is None:
        raise HelixError(f"model {name}: --vocab-size is missing.")
    if model.hybrid_layer_pattern is not None:
        raise HelixError(
            f"model {name}: --hybrid-layer-pattern is not planned from flags. Name the model or its "
            "config.json with --model: a nemotron_h is planned by that."
        )
    given = {key: flags[key] for key in sorted(flags) if flags[key] is not None}
    special = ORDINARY
    if linear := sum(model.linear_layers):
        delta_net = gated_delta_net(
            model.linear_num_key_heads,
            model.linear_num_value_heads,
            model.linear_key_head_dim,
            model.linear_value_head_dim,
            model.linear_conv_kernel_dim,
        )
        special = Special(linear=delta_net, linear_layers=linear)
    if model.multi_latent_attention:
        dims = (model.qk_pos_emb_head_dim, model.qk_head_dim, model.v_head_dim)
        latent = Latent(model.q_lora_rank or 0, model.kv_lora_rank, *dims)
        special = Special(latent=latent, wide_router=True)
    return dataclasses.replace(model, name=name, flags=given, source=source, special=special)
