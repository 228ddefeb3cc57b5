"""What a model is to the planner: sizes, from a preset, a Hugging Face config.json or Megatron flags."""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.catalog import Cut, layer_tensors, mlp_tensors
from helix_megatron.checkpoint.foreign import read_json
from helix_megatron.core.layout import RotaryStyle
from helix_megatron.errors import HelixError, listed
from helix_megatron.flags import flag_of
from helix_megatron.model.description import MODEL_FLAGS, SIZES, ModelConfig, padded_rows
from helix_megatron.model.fields import add_model_flags
from helix_megatron.plan.presets import PRESETS

VOCABULARY = 51200  # of a model whose flags name none: GPT-2's, padded


@dataclass(frozen=True, eq=False)  # hashed by identity, thousands of times
class ModelSpec:
    """Sizes of a GPT. D hidden size, h, g query and key-value heads, d dimensions of a head.

    dense_layers and expert_layers add up to num_layers; `windowed` of them see a sliding window.
    flags: the model flags that made it, for commands; source: where the sizes come from.
    """

    name: str
    config: ModelConfig = field(repr=False)
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    gated: bool = False
    tied: bool = True
    biases: bool = True
    qkv_biases: bool = True
    output_gate: bool = False
    qk_norm: bool = False
    rms_norm: bool = False
    rotary: RotaryStyle = "half"
    rotary_dim: int = 0
    learned_positions: int = 0
    window: int | None = None
    windowed: int = 0
    experts: int = 0
    topk: int = 0
    moe_ffn: int = 0
    shared_ffn: int = 0
    expert_layers: int = 0
    causal: bool = True
    pattern: tuple[bool, ...] = ()
    flags: tuple[tuple[str, Any], ...] = ()
    source: str = ""

    # -------------------------------------------------------------- parameters

    @property
    def dense_layers(self) -> int:
        return self.num_layers - self.expert_layers

    @property
    def qkv_rows(self) -> int:
        """Rows of linear_qkv: (h + 2g)·d, and h·d of the output gate."""
        return self.config.qkv_rows

    @property
    def fc1_factor(self) -> int:
        """Rows of linear_fc1 per row of activations: 2 where a gate is stacked on it."""
        return 2 if self.gated else 1

    @functools.cached_property
    def norm_parameters(self) -> int:
        """Of one norm of the hidden states."""
        return self.hidden_size * (1 if self.rms_norm else 2)

    @functools.cached_property
    def _layer_parameters(self) -> dict[str, list[int]]:
        """Of the parts of a layer, each with its norm: parameters that tensor parallelism cuts, and those that
        every rank holds whole."""
        counts = {part: [0, 0] for part in ("attention", "qk norms", "mlp", "router")}
        for moe in (False, True) if self.experts else (False,):
            for suffix, shape, cut in layer_tensors(self.config, moe):
                part = "qk norms" if "_layernorm." in suffix else "attention"
                if suffix.startswith("mlp."):
                    part = "router" if moe else "mlp"
                elif moe:
                    continue  # attention is that of any layer
                counts[part][cut is Cut.REPLICATED] += math.prod(shape)
        return counts

    def _on_rank(self, part: str, tensor_parallel: int) -> float:
        cut, whole = self._layer_parameters[part]
        return cut / tensor_parallel + whole

    def attention_parameters(self, tensor_parallel: int = 1) -> float:
        """Of one layer's attention with its norm, on one of so many tensor parallel ranks."""
        return sum(self._on_rank(part, tensor_parallel) for part in ("attention", "qk norms"))

    def mlp_parameters(self, tensor_parallel: int = 1) -> float:
        """Of one dense layer's MLP with its norm."""
        return self._on_rank("mlp", tensor_parallel)

    def router_parameters(self, tensor_parallel: int = 1) -> float:
        """Of one MoE layer outside its experts: norm, router, shared experts."""
        return self._on_rank("router", tensor_parallel)

    @functools.cache  # noqa: B019 - models live as long as the program
    def expert_parameters(self) -> float:
        """Of one expert."""
        return sum(math.prod(shape) for _, shape, _ in mlp_tensors(self.config, self.moe_ffn))

    def replicated_parameters(self, experts_here: float = 0.0) -> float:
        """Of all layers, those that every tensor parallel rank holds whole: norms, biases of row-parallel
        linears and of the experts here, routers. With sequence parallelism their gradients are summed."""
        attention, _, mlp, router = (whole for _, whole in self._layer_parameters.values())
        bias = self.hidden_size if self.biases else 0
        expert = attention + router + bias * experts_here
        return self.dense_layers * (attention + mlp) + self.expert_layers * expert

    @functools.cached_property
    def parameters(self) -> float:
        """All of them."""
        layers = self.num_layers * self.attention_parameters()
        layers += self.dense_layers * self.mlp_parameters()
        layers += self.expert_layers * (
            self.router_parameters() + self.experts * self.expert_parameters()
        )
        embeddings = self.vocab_size * (1 if self.tied else 2) + self.learned_positions
        return layers + embeddings * self.hidden_size + self.norm_parameters

    @functools.cached_property
    def active_parameters(self) -> float:
        """Those that one token passes through."""
        idle = self.expert_layers * (self.experts - self.topk) * self.expert_parameters()
        return self.parameters - idle

    def padded_vocab(self, tensor_parallel: int, unit: int = 128) -> int:
        """The vocabulary, padded as the training script pads it."""
        return padded_rows(self.vocab_size, unit, tensor_parallel)

    def flops_per_token(self, sequence: int) -> float:
        """Model FLOPs of a token in training, without recomputation: 6 per weight used, and attention."""
        weights = self.num_layers * (self.qkv_rows + self.num_heads * self.head_dim)
        weights += self.dense_layers * self.ffn_hidden_size * (self.fc1_factor + 1)
        per_token = self.moe_ffn * self.topk + self.shared_ffn
        weights += self.expert_layers * (per_token * (self.fc1_factor + 1) + self.experts)
        weights += self.vocab_size
        seen = sequence / 2 if self.causal else sequence
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * seen
        return 6 * weights * self.hidden_size + 3 * attention


def model_of(text: str) -> ModelSpec:
    """A preset, a config.json (or the directory that holds it), or Megatron flags in one string.

    Raises:
        HelixError: none of them; or a file or flags that describe no model.
    """
    if text.lower() in PRESETS:
        flags, source = PRESETS[text.lower()]
        return spec_of_flags(text.lower(), flags, source)
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
    close = difflib.get_close_matches(text.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise HelixError(
        f"model {text!r} is no preset and no config.json. Presets: {listed(PRESETS)}.{hint} Or give the path "
        "of a config.json, or Megatron flags (--num-layers, --hidden-size, --num-attention-heads, …)."
    )


def read_config(path: Path) -> ModelSpec:
    """A model from Hugging Face's config.json.

    Raises:
        HelixError: unreadable, of an unknown family, or with settings that its family here does not have.
    """
    from helix_megatron.model.families import family_of

    try:
        config = read_json(path)
    except HelixError as error:
        raise HelixError(f"cannot read model file {error}") from error
    try:
        flags = family_of(config).model_flags(config)
    except HelixError as error:
        raise HelixError(f"model file {path}: {error}") from error
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    return spec_of_flags(name, flags, str(path))


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
        close = difflib.get_close_matches(rest[0].split("=")[0], map(flag_of, MODEL_FLAGS), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise HelixError(f"{rest[0]!r} is no flag of helix plan and no model flag.{hint}")
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
        model = ModelConfig.from_flags(flags)
    except HelixError as error:
        raise HelixError(f"model {name}: {error}") from error
    if model.padded_vocab_size is None:
        raise HelixError(f"model {name}: --vocab-size is missing.")
    learned = model.position_embedding_type == "learned_absolute"
    return ModelSpec(
        name=name,
        config=model,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_kv_heads=model.num_query_groups,
        head_dim=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size or 0,
        vocab_size=model.padded_vocab_size,
        gated=model.is_gated,
        tied=not model.untie_embeddings_and_output_weights,
        biases=not model.disable_bias_linear,
        qkv_biases=model.add_qkv_bias,
        output_gate=model.attention_output_gate,
        qk_norm=model.qk_layernorm or model.qk_l2_norm,
        rms_norm=model.normalization == "RMSNorm",
        rotary=model.rotary,
        rotary_dim=model.rotary_dim,
        learned_positions=model.max_position_embeddings or 0 if learned else 0,
        window=model.window_size,
        windowed=sum(model.windowed_layers),
        experts=model.num_experts or 0,
        topk=model.moe_router_topk if model.num_experts else 0,
        moe_ffn=model.moe_ffn_hidden_size or 0 if model.num_experts else 0,
        shared_ffn=model.moe_shared_expert_intermediate_size or 0 if model.num_experts else 0,
        expert_layers=sum(model.moe_layers),
        pattern=model.moe_layers,
        flags=tuple(sorted((k, _frozen(v)) for k, v in flags.items() if v is not None)),
        source=source,
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
