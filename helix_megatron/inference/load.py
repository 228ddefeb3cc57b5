"""A model for inference, filled from any kind of checkpoint, tensor by tensor.

Whatever the files are, each rank reads canonical tensors one after another and keeps its part. So it needs the
memory of its part and of one tensor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from helix_megatron.checkpoint.source import Source
from helix_megatron.checkpoint.sources import open_source
from helix_megatron.errors import HelixError, listed
from helix_megatron.inference.arguments import InferenceConfig
from helix_megatron.megatron import cpu_runtime
from helix_megatron.megatron.fill import VOCABULARY, fill_weights
from helix_megatron.megatron.gpt import build_chunk, transformer_config
from helix_megatron.megatron.optional import available_backends
from helix_megatron.megatron.process_group import initialize_groups
from helix_megatron.megatron.random import seed_model_parallel
from helix_megatron.run.config import RunConfig
from helix_megatron.run.outcomes import on_every_rank

TORCH_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def inference_groups(config: InferenceConfig) -> None:
    """Megatron's and Helix's process groups, and random states. Collective."""
    assert isinstance(config.run, RunConfig)
    cpu_runtime.install()
    available_backends().check()
    initialize_groups(config.run)
    seed_model_parallel(config.run.training.seed)


def load_model(config: InferenceConfig) -> GPTModel:
    """This rank's part of the model, with the weights of a checkpoint; in eval mode, without gradients.

    Collective. Weights have the dtype `config.dtype`, all of them: Megatron's own half-precision models keep
    none in fp32. Rows that pad the vocabulary are zero: logits from `config.vocab_size` on mean nothing.

    The groups exist already (`inference_groups`).

    Raises:
        HelixError: a damaged checkpoint, or one that lacks tensors or has too many, by name. On all ranks
            alike.
    """
    assert isinstance(config.run, RunConfig)
    settings = transformer_config(config.run)
    settings.params_dtype = settings.pipeline_dtype = TORCH_DTYPES[config.dtype]
    # Otherwise every rank makes each weight whole before it keeps its part, and all of them are overwritten.
    settings.perform_initialization = False
    model = build_chunk(config.run, settings)
    # Megatron makes learned positions in fp32 whatever it is told.
    model.to(TORCH_DTYPES[config.dtype])
    for module in model.modules():  # Megatron's routers choose experts by it in fp32
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias = module.expert_bias.float()
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    _fill(model, config)
    model.requires_grad_(False)
    return model.eval()


def _fill(model: GPTModel, config: InferenceConfig) -> None:
    assert isinstance(config.run, RunConfig)
    path, model_config = Path(config.load_path), config.run.model
    vocabulary, rows = model_config.vocab_size, model_config.padded_vocab_size
    assert vocabulary is not None and rows is not None

    def fill() -> tuple[list[str], set[str]]:
        # Hashing is one rank's work on each machine: all of them read the same files.
        verify = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
        dtype = TORCH_DTYPES[config.dtype]
        source = open_source(path, trust=config.trust_checkpoint, verify=verify, dtype=dtype)
        tensors = _Tensors(source, vocabulary, rows)
        fill_weights(model, tensors)
        source.finish()
        return source.names, tensors.asked

    names, asked = on_every_rank(fill)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, asked)
    unused = [name for name in names if name not in set().union(*everyone)]
    if unused:
        raise HelixError(
            f"{path} has {len(unused)} tensors that have no place in the model: {listed(unused[:3])}"
            f"{', …' if len(unused) > 3 else ''}. It holds another model than its flags say."
        )


class _Tensors:
    """A source's tensors as the model wants them; remembers which were asked for.

    The last one is kept, since the two halves of a gated MLP are parts of one tensor.
    """

    def __init__(self, source: Source, vocabulary: int, padded_vocabulary: int) -> None:
        self._source, self._rows = source, min(vocabulary, padded_vocabulary)
        self._names = set(source.names)
        self._last: tuple[str, Tensor] | None = None
        self.asked: set[str] = set()

    def __call__(self, name: str) -> Tensor:
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        if name not in self._names:
            raise HelixError(
                f"{self._source.directory} has no tensor {name}, which the model needs. It holds another "
                "model than its flags say."
            )
        self._last = None  # before the next is read: one whole tensor at a time
        value = self._source.read(name)
        if name in VOCABULARY:
            value = value[: self._rows]  # a checkpoint may have been padded for other ranks
        self.asked.add(name)
        self._last = name, value
        return value
