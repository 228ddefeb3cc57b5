"""Text towers of models that see: their part of `config.json`, and where their tensors stand in files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Text models that are those of another model_type as long as no picture is among the tokens: then all parts of
# a multimodal position are the position itself.
SAME_AS = {
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "kimi_k2": "deepseek_v3",  # which sees nothing: DeepSeek-V3's model under another name
}
PICTURES = ("mrope_section", "mrope_interleaved")  # of rotary embedding
PREFIXES = ("model.language_model.", "language_model.model.")


def is_tower(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that has more than its text."""
    return (
        isinstance(config.get("text_config"), Mapping) or str(config.get("model_type")) in SAME_AS
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text of a model that sees, as a text model has it; any other as it is."""
    if not is_tower(config):
        return config
    inner = config.get("text_config")
    text = dict(inner if isinstance(inner, Mapping) else config)
    kind = text.get("model_type")
    text["model_type"] = SAME_AS.get(kind, kind) if isinstance(kind, str) else kind
    text.pop("architectures", None)  # of the whole
    if "tie_word_embeddings" in config:  # the whole decides
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(key), Mapping) and text["model_type"] != kind:
            rope = {name: value for name, value in text[key].items() if name not in PICTURES}
            for name in ("type", "rope_type"):
                if rope.get(name) == "mrope":
                    rope[name] = "default"
            text[key] = rope
    return text


def text_prefix(names: Collection[str], prefix: str) -> str:
    """What the names of a text model's tensors begin with: `prefix`, that of a tower, or nothing."""
    for one in (*PREFIXES, prefix):
        if any(name.startswith(one) for name in names):
            return one
    return ""


def head_prefix(names: Collection[str]) -> str:
    """The same of the output layer."""
    return "language_model." if "language_model.lm_head.weight" in names else ""
