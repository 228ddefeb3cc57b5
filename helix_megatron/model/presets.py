"""The paper's models, at full size and at a size for a laptop, as defaults of the flags."""

from __future__ import annotations

from typing import Any

# 4 layers, 16 heads of 512, MLP hidden size 32768, sequences of 10000, batch 1024, 16-bit floats, 16 ranks.
# The batch is cut into micro-batches of one sequence: a whole one would be 168 GB per activation tensor.
PAPER = {
    "num_layers": 4,
    "hidden_size": 8192,
    "ffn_hidden_size": 32768,
    "num_attention_heads": 16,
    "seq_length": 10000,
    "micro_batch_size": 1,
    "global_batch_size": 1024,
    "tensor_model_parallel_size": 16,
    "intra_head_parallel_size": 4,
    "sequence_parallel": True,
    "bf16": True,
    "train_iters": 1000,
    "lr": 3e-4,
    "lr_warmup_iters": 100,
}
# The same shape at 1/64 of the width, on 4 ranks.
SMALL = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 512,
    "num_attention_heads": 16,
    "seq_length": 128,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "tensor_model_parallel_size": 4,
    "intra_head_parallel_size": 2,
    "sequence_parallel": True,
    "train_iters": 100,
    "lr": 1e-3,
}
EXPERTS = {"num_experts": 8, "moe_router_topk": 2}

PRESETS: dict[str, dict[str, Any]] = {
    "paper-dense": PAPER,
    "paper-dense-small": SMALL,
    # Whole experts: Megatron cuts none that have biases.
    "paper-moe": PAPER | EXPERTS | {"expert_model_parallel_size": 8},
    "paper-moe-small": SMALL | EXPERTS | {"expert_model_parallel_size": 4},
}
