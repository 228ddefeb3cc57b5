"""Phi-3 and Phi-4: Llama with queries, keys and values in one matrix, gate and up in another."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, keys
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.pieces import Heads, Tied, Unread, Values
from helix_megatron.model.families.positions import Rope, Window
from helix_megatron.model.families.tensors import ATTENTION_LAYER, LLAMA_OUTER

LAYER = (
    *(row for row in ATTENTION_LAYER if row.join != "qkv"),
    Row("self_attention.linear_qkv.weight", "self_attn.qkv_proj.weight[QKV,D]", "fused-qkv"),
    Row("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight[2F,D]"),
    Row("mlp.linear_fc2.weight", "mlp.down_proj.weight[D,F]"),
)

FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(),
        Rope(partial=1.0),
        Window(),
        keys(max_position_embeddings=4096, norm_epsilon=1e-5),
        Values(resid_pdrop=("hidden_dropout", 0.0), embd_pdrop=("hidden_dropout", 0.0)),
        Tied(False),
        NO_BIASES,
        Unread("original_max_position_embeddings"),  # of longrope, which is refused
    ),
    rows=LAYER,
    outer=LLAMA_OUTER,
)
