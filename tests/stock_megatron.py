"""Stock megatron-core alone: loads or saves a checkpoint and prints losses. helix_megatron cannot be imported.

    python tests/stock_megatron.py load|save DIRECTORY MODEL.json

What CUDA would do is stood in for by a few lines here, for one process on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.abc
import json
import os
import sys
from typing import Any


class NoHelix(importlib.abc.MetaPathFinder):
    """Refuses to find the package whose absence is the point."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".", maxsplit=1)[0] == "helix_megatron":
            raise ImportError(f"{name} must not be imported here")


sys.meta_path.insert(0, NoHelix())

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.tensor_parallel.random import initialize_rng_tracker  # noqa: E402
from megatron.core.transformer import (  # noqa: E402
    MLATransformerConfig,
    TransformerConfig,
    multi_latent_attention,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from torch.distributed.checkpoint import FileSystemReader  # noqa: E402


def build(model: dict[str, Any]) -> GPTModel:
    """A GPT of one process from `{"config": …, "spec": …, "gpt": …}`."""
    settings = model["config"]
    if settings.get("gated_linear_unit"):
        settings = settings | {"activation_func": torch.nn.functional.silu}
    latent = settings.get("multi_latent_attention")
    config = (MLATransformerConfig if latent else TransformerConfig)(
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **settings,
    )
    if latent:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, **model["spec"])
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = Core
    else:
        spec = get_gpt_layer_local_spec(**model["spec"])
    return GPTModel(config, spec, **model["gpt"]).eval()


class Core(DotProductAttention):
    """Latent attention gives it the sizes of heads, which only Transformer Engine's takes."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def loss_of(model: GPTModel, tokens: torch.Tensor) -> list[float]:
    """Loss of every sample, [batch]."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.size(1)).expand_as(inputs)
    mask = torch.ones(1, 1, inputs.size(1), inputs.size(1)).triu(1).bool()
    with torch.no_grad():
        return model(inputs, positions, mask, labels=labels).mean(1).tolist()


def main() -> None:
    action, directory, path = sys.argv[1:]
    with open(path) as file:
        model = json.load(file)
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False  # 0.16.1 takes it for installed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    initialize_rng_tracker(inference_rng_tracker=True)  # nothing is dropped
    torch.manual_seed(7)
    gpt = build(model)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = {"model": gpt.sharded_state_dict(metadata=metadata)}
    tokens = torch.tensor(model["tokens"])
    if action == "save":
        generator = torch.Generator().manual_seed(11)
        for parameter in gpt.parameters():  # norms and biases too
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        os.makedirs(directory)
        if "args" in model:  # as Megatron-LM keeps them
            sharded["args"] = argparse.Namespace(**model["args"])
        dist_checkpointing.save(sharded, directory)
    else:
        before = loss_of(gpt, tokens)
        asked = {item.key for item in nested_values(sharded["model"]) if hasattr(item, "key")}
        gpt.load_state_dict(dist_checkpointing.load(sharded, directory)["model"])
        stored = FileSystemReader(directory).read_metadata().state_dict_metadata
        weights = {key for key, entry in stored.items() if hasattr(entry, "size")}
        unused = {key for key in weights - asked if not key.startswith(("optimizer", "rng_state"))}
        assert not unused, unused
        assert before != loss_of(gpt, tokens)
    assert not [name for name in sys.modules if name.startswith("helix")]
    print(json.dumps(loss_of(gpt, tokens)))


if __name__ == "__main__":
    main()
