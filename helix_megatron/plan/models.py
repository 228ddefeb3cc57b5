"""What a model is to the planner: sizes, from a preset, a Hugging Face config.json or Megatron flags."""

from __future__ import annotations

import difflib
import functools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.families.flags import complete, expert_layers, windowed_layers
from helix_megatron.errors import HelixError, listed
from helix_megatron.layout import RotaryStyle, rotary_of
from helix_megatron.plan.presets import PRESETS

# Entries of config.json that are sizes.
CONFIG_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


@dataclass(frozen=True, eq=False)  # hashed by identity, thousands of times
class ModelSpec:
    """Sizes of a GPT. D hidden size, h, g query and key-value heads, d dimensions of a head.

    dense_layers and expert_layers add up to num_layers; `windowed` of them see a sliding window.
    flags: the model flags that made it, for commands; source: where the sizes come from.
    """

    name: str
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
        heads = self.num_heads * (2 if self.output_gate else 1) + 2 * self.num_kv_heads
        return heads * self.head_dim

    @property
    def fc1_factor(self) -> int:
        """Rows of linear_fc1 per row of activations: 2 where a gate is stacked on it."""
        return 2 if self.gated else 1

    @functools.cached_property
    def norm_parameters(self) -> int:
        """Of one norm of the hidden states."""
        return self.hidden_size * (1 if self.rms_norm else 2)

    def attention_parameters(self, tensor_parallel: int = 1) -> float:
        """Of one layer's attention with its norm, on one of so many tensor parallel ranks."""
        hidden = self.hidden_size
        cut = self.qkv_rows * hidden + self.num_heads * self.head_dim * hidden
        cut += self.qkv_rows if self.biases or self.qkv_biases else 0
        whole = self.norm_parameters + (hidden if self.biases else 0)
        if self.qk_norm:
            whole += 2 * self.head_dim * (1 if self.rms_norm else 2)
        return cut / tensor_parallel + whole

    def mlp_parameters(self, tensor_parallel: int = 1) -> float:
        """Of one dense layer's MLP with its norm."""
        rows = self.ffn_hidden_size * (self.fc1_factor + 1)
        biases = self.ffn_hidden_size * self.fc1_factor if self.biases else 0
        whole = self.norm_parameters + (self.hidden_size if self.biases else 0)
        return (rows * self.hidden_size + biases) / tensor_parallel + whole

    def expert_parameters(self) -> float:
        """Of one expert."""
        biases = self.moe_ffn * self.fc1_factor + self.hidden_size if self.biases else 0
        return self.moe_ffn * (self.fc1_factor + 1) * self.hidden_size + biases

    def router_parameters(self, tensor_parallel: int = 1) -> float:
        """Of one MoE layer outside its experts: norm, router, shared experts."""
        shared = self.shared_ffn * (self.fc1_factor + 1) * self.hidden_size / tensor_parallel
        router = self.experts * (self.hidden_size + (1 if self.biases else 0))
        return self.norm_parameters + router + shared

    def replicated_parameters(self, experts_here: float = 0.0) -> float:
        """Of all layers, those that every tensor parallel rank holds whole: norms, biases of row-parallel
        linears and of the experts here, routers. With sequence parallelism their gradients are summed."""
        bias = self.hidden_size if self.biases else 0
        dense = 2 * self.norm_parameters + 2 * bias
        router = self.experts * (self.hidden_size + (1 if self.biases else 0))
        expert = 2 * self.norm_parameters + bias + router + bias * experts_here
        return self.dense_layers * dense + self.expert_layers * expert

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
        if unit % tensor_parallel:
            unit *= tensor_parallel
        return -(-self.vocab_size // unit) * unit

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
    from helix_megatron.checkpoint.families import family_of

    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise HelixError(f"cannot read model file {path}: {error.strerror}.") from error
    except ValueError as error:
        raise HelixError(f"model file {path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise HelixError(f"model file {path} must be an object, as Hugging Face's config.json is.")
    for key in CONFIG_SIZES:
        if config.get(key) is not None and not isinstance(config[key], int):
            raise HelixError(
                f"model file {path}: {key} is {config[key]!r}. It must be a whole number."
            )
    try:
        flags = family_of(config).model_flags(config)
    except HelixError as error:
        raise HelixError(f"model file {path}: {error}") from error
    except (TypeError, ValueError, KeyError) as error:
        raise HelixError(f"model file {path} holds a value that is no size: {error}.") from error
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    return spec_of_flags(name, flags, str(path))


def model_of_arguments(arguments: Sequence[str]) -> ModelSpec:
    """A model from Megatron flags: those of the training script.

    Raises:
        HelixError: flags that the training script does not have, or sizes missing.
    """
    import argparse

    from helix_megatron.training.arguments import EXPERTS, MODEL, _add

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise HelixError(
                f"model flags: {message}. Valid: the model flags of pretrain_gpt.py --help."
            )

    parser = Parser(add_help=False, allow_abbrev=False)
    for row in MODEL + EXPERTS:
        _add(parser, row)
    args, rest = parser.parse_known_args(list(arguments))
    if rest:
        names = [row[0] for row in MODEL + EXPERTS]
        close = difflib.get_close_matches(rest[0].split("=")[0], names, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise HelixError(f"{rest[0]!r} is no flag of helix plan and no model flag.{hint}")
    given = {word.split("=")[0] for word in arguments if word.startswith("--")}
    for flag in ("--num-layers", "--hidden-size", "--num-attention-heads"):
        if flag not in given:
            raise HelixError(f"a model from Megatron flags needs {flag}. Or name one with --model.")
    flags = {
        key: value
        for key, value in vars(args).items()
        if "--" + key.replace("_", "-") in given and key != "seq_length"
    }
    flags.setdefault("vocab_size", 51200)
    return spec_of_flags("megatron-flags", flags, "command line")


def spec_of_flags(name: str, flags: Mapping[str, Any], source: str) -> ModelSpec:
    """A model from its flags by their destination names.

    Raises:
        HelixError: sizes that are missing or impossible.
    """
    for key in ("num_layers", "hidden_size", "num_attention_heads"):
        _check_size(name, key, flags.get(key))
    heads = flags["num_attention_heads"]
    if flags.get("kv_channels") is None and flags["hidden_size"] % heads:
        raise HelixError(
            f"model {name}: hidden size {flags['hidden_size']} does not divide into {heads} heads. Give the "
            "dimensions of a head (--kv-channels, head_dim)."
        )
    full = complete(flags)
    for key in ("num_query_groups", "kv_channels", "ffn_hidden_size", "padded_vocab_size"):
        _check_size(name, key, full[key])
    groups = full["num_query_groups"]
    if heads % groups:
        raise HelixError(
            f"model {name}: {heads} query heads cannot share {groups} key-value heads."
        )
    experts = full["num_experts"] or 0
    if experts:
        _check_size(name, "moe_ffn_hidden_size", full["moe_ffn_hidden_size"])
        if not 1 <= full["moe_router_topk"] <= experts:
            raise HelixError(
                f"model {name}: a token has 1 to {experts} experts, not {full['moe_router_topk']}."
            )
    rope = full["position_embedding_type"] == "rope"
    percent = full["rotary_percent"] if rope else 0.0
    rotary, rotary_dim = rotary_of(full["kv_channels"], percent, full["rotary_interleaved"])
    learned = full["position_embedding_type"] == "learned_absolute"
    pattern = tuple(expert_layers(full))
    return ModelSpec(
        name=name,
        num_layers=full["num_layers"],
        hidden_size=full["hidden_size"],
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=full["kv_channels"],
        ffn_hidden_size=full["ffn_hidden_size"],
        vocab_size=full["padded_vocab_size"],
        gated=bool(full["swiglu"] or full["geglu"]),
        tied=not full["untie_embeddings_and_output_weights"],
        biases=not full["disable_bias_linear"],
        qkv_biases=bool(full["add_qkv_bias"]),
        output_gate=bool(full["attention_output_gate"]),
        qk_norm=bool(full["qk_layernorm"] or full["qk_l2_norm"]),
        rms_norm=full["normalization"] == "RMSNorm",
        rotary=rotary,
        rotary_dim=rotary_dim,
        learned_positions=(full["max_position_embeddings"] or 0) if learned else 0,
        window=full["window_size"],
        windowed=sum(windowed_layers(full)),
        experts=experts,
        topk=full["moe_router_topk"] if experts else 0,
        moe_ffn=full["moe_ffn_hidden_size"] if experts else 0,
        shared_ffn=full["moe_shared_expert_intermediate_size"] or 0 if experts else 0,
        expert_layers=sum(pattern),
        pattern=pattern,
        flags=tuple(sorted((k, _frozen(v)) for k, v in flags.items() if v is not None)),
        source=source,
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_size(name: str, key: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        label = "vocab_size" if key == "padded_vocab_size" else key
        raise HelixError(
            f"model {name}: {label} is {value!r}. It must be a whole number of at least 1."
        )
