"""Parts of a `config.json` and the model flags that they stand for, each in both directions.

A family is a tuple of these pieces. `keys` are what a piece understands. Of the other keys those are refused
that transformers reads (`READ`), and those that change nothing there pass (`HARMLESS`). Whatever else stands in
a file transformers does not read, and so it is noted and left alone.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from helix_megatron.errors import HelixError, listed
from helix_megatron.flags import flag_of, problem_of
from helix_megatron.model.description import ModelConfig

Config = Mapping[str, Any]
FIELDS = {f.name: f for f in dataclasses.fields(ModelConfig)}

# Keys that decide nothing between tokens and logits of a model in evaluation.
NAMES_OF_HARMLESS = """
    architectures model_type dtype torch_dtype transformers_version use_cache tokenizer_class
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    output_attentions output_hidden_states output_router_logits router_aux_loss_coef return_dict
    pretraining_tp gradient_checkpointing attn_implementation task_specific_params
    id2label label2id num_labels problem_type finetuning_task max_length min_length do_sample temperature
    top_k top_p typical_p repetition_penalty length_penalty num_beams num_return_sequences
    chunk_size_feed_forward prefix n_ctx reorder_and_upcast_attn
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
"""
HARMLESS = frozenset(NAMES_OF_HARMLESS.split())
HARMLESS_PREFIXES = ("_", "unsloth")
# Keys of every model_type by which transformers, in one of its versions, loads or computes something else. A
# test compares them and the families' own keys with the classes.
NAMES_OF_READ = """
    quantization_config compression_config is_encoder_decoder add_cross_attention
    tie_encoder_decoder pruned_heads partial_rotary_factor
"""
READ = frozenset(NAMES_OF_READ.split())


class Piece(ABC):
    """Some keys of a `config.json` and the flags they stand for."""

    keys: tuple[str, ...] = ()  # that this piece understands
    # Keys whose values have the type and the range of a field of `ModelConfig`.
    fields: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def flags(self, config: Config) -> dict[str, Any]:
        """Model flags; HelixError for what Megatron's GPT cannot do."""

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """The inverse; nothing where the keys have no other value."""
        return {}


class Values(Piece):
    """Keys that are flags under another name. A default of `...` means that the key must be there."""

    def __init__(self, **keys: tuple[str, Any]) -> None:
        self.rows = keys
        self.keys = tuple(keys)
        self.fields = {key: flag for key, (flag, _) in keys.items()}  # type: ignore[misc]

    def flags(self, config: Config) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first: dict[str, str] = {}
        for key, (flag, default) in self.rows.items():
            value = needed(config, key, default)
            if found.setdefault(flag, value) != value:
                raise HelixError(
                    f"config.json sets {first[flag]} = {found[flag]!r} and {key} = {value!r}, and Megatron "
                    f"has one setting for both, {flag_of(flag)}. Give them one value."
                )
            first.setdefault(flag, key)
        return found

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {key: getattr(model, flag) for key, (flag, _) in self.rows.items()}


class Only(Piece):
    """Keys of which only some values can be expressed. The first is written."""

    def __init__(self, **valid: tuple[Any, ...]) -> None:
        self.valid = valid
        self.keys = tuple(valid)

    def flags(self, config: Config) -> dict[str, Any]:
        for key, valid in self.valid.items():
            value = config.get(key, valid[0])
            if value not in valid:
                raise HelixError(
                    f"config.json sets {key} = {value!r}, which Megatron's GPT cannot compute. Valid: "
                    f"{listed(map(repr, valid))}."
                )
        return {}


class Always(Piece):
    """Flags that every model of a family has."""

    def __init__(self, **fixed: Any) -> None:
        self.fixed = fixed

    def flags(self, config: Config) -> dict[str, Any]:
        return dict(self.fixed)


@dataclass(frozen=True)
class Vocabulary(Piece):
    """Rows of the word embedding. Rows that pad it for tensor parallel ranks have no place in it.

    Args:
        default: of families whose files leave the key out; `...` where it must be there.
    """

    default: Any = ...
    keys: tuple[str, ...] = ("vocab_size",)
    fields: ClassVar = {"vocab_size": "vocab_size"}

    def flags(self, config: Config) -> dict[str, Any]:
        size = needed(config, "vocab_size", self.default)
        return {"vocab_size": size, "padded_vocab_size": size, "make_vocab_size_divisible_by": 1}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {"vocab_size": model.unpadded().padded_vocab_size}


@dataclass(frozen=True)
class Tied(Piece):
    """Whether output weights are the word embedding's; `default` is the family's."""

    default: bool
    keys: tuple[str, ...] = ("tie_word_embeddings",)
    fields: ClassVar = {"tie_word_embeddings": "untie_embeddings_and_output_weights"}

    def flags(self, config: Config) -> dict[str, Any]:
        tied = needed(config, "tie_word_embeddings", self.default)
        return {"untie_embeddings_and_output_weights": not tied}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {"tie_word_embeddings": not model.untie_embeddings_and_output_weights}


@dataclass(frozen=True)
class Heads(Piece):
    """Query heads, key-value heads and dimensions of a head; `heads`, `kv_heads`, `head_dim` without the keys.

    With `explicit` the last are always written, since the library's model does not work without.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    explicit: bool = False
    heads: Any = ...
    keys: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "head_dim")
    fields: ClassVar = {
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
    }

    def flags(self, config: Config) -> dict[str, Any]:
        heads = needed(config, "num_attention_heads", self.heads)
        kv_heads = config.get("num_key_value_heads", self.kv_heads) or heads
        if heads % kv_heads:
            raise HelixError(
                f"config.json has num_attention_heads = {heads} and num_key_value_heads = {kv_heads}: the "
                "first must be a multiple of the second."
            )
        return {
            "num_attention_heads": heads,
            "group_query_attention": kv_heads != heads,
            "num_query_groups": kv_heads,
            "kv_channels": config.get("head_dim", self.head_dim),
        }

    def config(self, model: ModelConfig) -> dict[str, Any]:
        heads, head_dim = model.num_attention_heads, model.head_dim
        written = {"num_attention_heads": heads, "num_key_value_heads": model.num_query_groups}
        if self.explicit or self.head_dim is not None or head_dim * heads != model.hidden_size:
            written["head_dim"] = head_dim
        return written


class Activation(Piece):
    """Which flags an activation's name stands for. The first name of equal flags is written."""

    def __init__(self, key: str, default: str, names: Mapping[str, Mapping[str, bool]]) -> None:
        self.key, self.default, self.names = key, default, names
        self.keys = (key,)

    def flags(self, config: Config) -> dict[str, Any]:
        name = needed(config, self.key, self.default)
        if not isinstance(name, str) or name not in self.names:
            raise HelixError(
                f"config.json sets {self.key} = {name!r}, which Megatron's GPT does not have in this "
                f"family. Valid: {listed(self.names)}."
            )
        return {"swiglu": False, "geglu": False, "openai_gelu": False} | dict(self.names[name])

    def config(self, model: ModelConfig) -> dict[str, Any]:
        for name, meaning in self.names.items():
            if all(getattr(model, flag) == value for flag, value in meaning.items()):
                return {self.key: name}
        return {self.key: self.default}


def needed(config: Config, key: str, default: Any = ...) -> Any:
    """A value of `config.json`, or the family's default.

    Raises:
        HelixError: it is missing and has no default.
    """
    value = config.get(key, default)
    if value is ... or (value is None and default is not None):
        if default is not ... and value is None:
            return default
        raise HelixError(
            f"config.json has no {key}. Take it from the model that the weights are of."
        )
    return value


def check_field(key: str, field: str, value: Any) -> None:
    """Refuse a value of config.json that a field of `ModelConfig` cannot have; None is what was not given.

    Raises:
        HelixError: another type, or outside of the range; names the key.
    """
    problem = None if value is None else problem_of(FIELDS[field], value)
    if problem:
        raise HelixError(f"config.json sets {key} = {value!r:.80}. {problem}")


class LinearBiases(Piece):
    """Biases of linear layers: Megatron has them in all, in `linear_qkv` alone, or in none."""

    keys = ("attention_bias", "mlp_bias")
    fields: ClassVar = dict.fromkeys(keys, "disable_bias_linear")

    def flags(self, config: Config) -> dict[str, Any]:
        attention, mlp = (config.get(key, False) for key in self.keys)
        if attention != mlp:
            raise HelixError(
                f"config.json sets attention_bias = {attention} and mlp_bias = {mlp}. Megatron's GPT has "
                "biases in all linear layers, in none, or in queries, keys and values alone."
            )
        return {"disable_bias_linear": not attention, "add_qkv_bias": False}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return dict.fromkeys(self.keys, not model.disable_bias_linear)


@dataclass(frozen=True)
class AllBiases(Piece):
    """One key for the biases of all linear layers; `default` when it is absent."""

    default: bool
    keys: tuple[str, ...] = ("use_bias",)
    fields: ClassVar = {"use_bias": "disable_bias_linear"}

    def flags(self, config: Config) -> dict[str, Any]:
        biases = needed(config, "use_bias", self.default)
        return {"disable_bias_linear": not biases, "add_qkv_bias": False}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {"use_bias": not model.disable_bias_linear}


class Unread(Piece):
    """Keys that a family's files have and that decide nothing of what is converted."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys

    def flags(self, config: Config) -> dict[str, Any]:
        return {}


class SoftCaps(Piece):
    """Soft caps of scores and logits, null where there is none, with the family's defaults."""

    def __init__(self, **defaults: float | None) -> None:
        self.defaults, self.keys = defaults, tuple(defaults)
        self.fields = {key: key for key in defaults}  # type: ignore[misc]

    def flags(self, config: Config) -> dict[str, Any]:
        return {key: config.get(key, default) for key, default in self.defaults.items()}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {key: getattr(model, key) for key in self.keys}


class EmbeddingScale(Piece):
    """Gemma multiplies the word embedding by the square root of the hidden size."""

    def flags(self, config: Config) -> dict[str, Any]:
        return {"embedding_multiplier": needed(config, "hidden_size") ** 0.5}
