"""Hugging Face models on more ranks than they have key-value heads: `transformers` models, cut in place.

    groups = make_groups(tensor_parallel_size=4, intra_head_parallel_size=2)
    model = from_pretrained("PATH", 2, tensor_group=groups.tensor, intra_head_group=groups.intra_head)
    model.generate(...)                       # on every rank, with the same input
    save_pretrained(model, "OTHER PATH")      # whole weights again, for plain transformers

`shard` cuts a model that is loaded already; `plan` says, without a process group, what it would cut.
"""

from helix_megatron import versions

versions.require("torch", "transformers", "accelerate", "safetensors")

from helix_megatron.huggingface.cuts import Cut
from helix_megatron.huggingface.gradients import clip_grad_norm_, grad_norm
from helix_megatron.huggingface.groups import Groups, make_groups
from helix_megatron.huggingface.load import from_pretrained
from helix_megatron.huggingface.plan import Plan, plan
from helix_megatron.huggingface.save import gather_state_dict, save_pretrained
from helix_megatron.huggingface.shard import shard
from helix_megatron.huggingface.sharding import Sharding, sharding_of

__all__ = [
    "Cut",
    "Groups",
    "Plan",
    "Sharding",
    "clip_grad_norm_",
    "from_pretrained",
    "gather_state_dict",
    "grad_norm",
    "make_groups",
    "plan",
    "save_pretrained",
    "shard",
    "sharding_of",
]
