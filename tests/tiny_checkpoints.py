"""Tiny models by their flags, with recognisable weights; and tiny checkpoints of them on disk."""

from __future__ import annotations

import hashlib
import json
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helix_megatron.checkpoint.catalog import CanonicalTensor, catalog
from helix_megatron.model.families import family_of

BASE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "vocab_size": 100,
    "padded_vocab_size": 100,
    "make_vocab_size_divisible_by": 1,
}
GQA = {"group_query_attention": True, "num_query_groups": 2, "kv_channels": 16}
EXPERTS = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 16,
    "disable_bias_linear": True,
    "swiglu": True,
    "normalization": "RMSNorm",
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gqa": {**GQA, "swiglu": True, "disable_bias_linear": True, "add_qkv_bias": True},
    "qk norm, gates, partial rotary": {
        **GQA,
        "qk_layernorm": True,
        "attention_output_gate": True,
        "rotary_percent": 0.5,
        "untie_embeddings_and_output_weights": True,
    },
    "positions": {"position_embedding_type": "learned_absolute", "openai_gelu": True},
    "experts": {**EXPERTS, **GQA},
    "experts with biases": {**EXPERTS, "disable_bias_linear": False, "swiglu": False},
    "every other layer has experts": {
        **EXPERTS,
        "moe_layer_freq": 2,
        "moe_shared_expert_intermediate_size": 16,
        "moe_shared_expert_gate": True,
        "qk_layernorm": True,
    },
    "layers listed": {**EXPERTS, "moe_layer_freq": [0, 1, 1, 1], "geglu": True, "swiglu": False},
}


def flags_of(model: str) -> dict[str, Any]:
    return BASE | MODELS[model]


def value_of(tensor: CanonicalTensor) -> np.ndarray:
    """Different at every element of every tensor, and exact in fp32."""
    start = zlib.crc32(tensor.name.encode()) % 1_000_003
    values = start + np.arange(tensor.numel)
    return values.astype(np.float32).reshape(tensor.shape)


def run_of(flags: dict[str, Any], *, world_size: int | None = None, **values: Any) -> Any:
    """A run with the model of model flags, on as many ranks as hold it."""
    from helix_megatron.model.description import ModelConfig
    from helix_megatron.run.config import RunConfig

    rows = flags.get("vocab_size") or flags["padded_vocab_size"]
    model = ModelConfig.from_flags(flags | {"vocab_size": rows, "padded_vocab_size": None})
    ranks = values.get("tensor_model_parallel_size", 1)
    ranks *= values.get("pipeline_model_parallel_size", 1)
    run = RunConfig.from_values(model.to_flags() | values, world_size or ranks)
    return run.with_padded_vocabulary()


def build(flags: dict[str, Any], sizes: tuple[int, ...], query_layout: str, world_size: int) -> Any:
    """This rank's GPTModel."""
    from helix_megatron import parallel_state
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.gpt import build_chunk, transformer_config
    from helix_megatron.megatron.random import seed_model_parallel

    cpu_runtime.install()
    tp, pp, ep, etp, m = sizes
    run = run_of(
        flags,
        world_size=world_size,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        intra_head_parallel_size=m,
        helix_query_layout=query_layout,
        sequence_parallel=bool(flags.get("num_experts")) and tp > 1,
    )
    parallel_state.initialize_model_parallel(
        tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        intra_head_parallel_size=m,
        distributed_timeout_minutes=10,
    )
    seed_model_parallel(1)
    config = transformer_config(run)
    return build_chunk(run, config)


def whole_model(flags: dict[str, Any]) -> dict[str, Tensor]:
    """Canonical name → tensor."""
    return {tensor.name: torch.from_numpy(value_of(tensor)) for tensor in catalog(flags)}


# ------------------------------------------------------------------ hugging face

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mixtral": SMALL
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 24,
        "vocab_size": 61,
        "activation_function": "gelu_new",
    },
}
TOKENIZER = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "generation_config.json": '{"eos_token_id": 2}',
    "merges.txt": "a b\n",
    "chat_template.jinja": "{{ messages }}",
}


def hugging_face_tensors(
    model: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Random tensors of a model, by their Hugging Face names."""
    family = family_of(CONFIGS[model])
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for rule in family.rules(family.model_flags(CONFIGS[model]))
        for name, shape in zip(rule.sources, rule.shapes, strict=True)
    }


def write_hugging_face(
    folder: Path,
    model: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    files: int = 1,
    seed: int = 0,
) -> Path:
    """A model as transformers saves it, by the safetensors package; with a tokenizer's files."""
    tensors = hugging_face_tensors(model, dtype, seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[model], indent=2) + "\n")
    for name, content in TOKENIZER.items():
        (folder / name).write_text(content)
    parts: list[Sequence[str]] = [list(tensors)[number::files] for number in range(files)]
    table = {}
    for number, part in enumerate(parts, 1):
        name = (
            f"model-{number:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        )
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
        table |= dict.fromkeys(part, name)
    if files > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


OWN = {
    "helix.json",
    "helix.json.sha256",
}  # what a converted directory has besides the original's files


def hashes(folder: Path) -> dict[str, str]:
    """Relative path → SHA-256 of each file, of what is not ours to add.

    Of safetensors it is of the tensors by name, with dtype and shape, and of their index of its table: their
    order in a file says nothing.
    """
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in OWN
    }


def _content(path: Path) -> bytes:
    if path.suffix == ".safetensors":
        tensors = sorted(load_file(path).items())
        return pickle.dumps(
            [(n, t.dtype, t.shape, t.view(torch.uint8).numpy()) for n, t in tensors]
        )
    if path.name.endswith(".index.json"):
        return repr(sorted(json.loads(path.read_text())["weight_map"].items())).encode()
    return path.read_bytes()
