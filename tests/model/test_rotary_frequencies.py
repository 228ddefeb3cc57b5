"""Rotary frequencies are those of transformers to the bit, with the constants that published models have.

Logits of a few tokens would not tell: what scaling changes are the slowest pairs of a head.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import LLAMA3_ROPE, SIZE
from tiny_checkpoints import run_of

from helix_megatron.model.families import family_of

ROPES = {
    "Llama 3.2": ("llama", LLAMA3_ROPE | {"factor": 32.0}),
    "Llama 4 Scout": ("llama", LLAMA3_ROPE | {"factor": 16.0, "high_freq_factor": 1.0}),
    "another constant": ("llama", LLAMA3_ROPE | {"high_freq_factor": 2.5}),
    "StarCoder2 3B": ("starcoder2", {"rope_type": "default", "rope_theta": 999999.4420358813}),
}


def built_frequencies(flags: dict[str, Any]) -> torch.Tensor:
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.gpt import build_chunk, transformer_config
    from helix_megatron.megatron.process_group import initialize_groups
    from helix_megatron.megatron.random import seed_model_parallel

    cpu_runtime.install()
    run = run_of(flags, world_size=1)
    initialize_groups(run)
    seed_model_parallel(1)
    return build_chunk(run, transformer_config(run)).rotary_pos_emb.inv_freq


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(pool, name):
    """And config.json has them again on the way back."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, rope = ROPES[name]
    settings = SIZE | {"hidden_size": 256, "rope_parameters": rope}
    config = AutoConfig.for_model(model_type, **settings)
    family = family_of(config.to_dict())
    flags = family.model_flags(config.to_dict())
    (found,) = pool.run(built_frequencies, flags, world_size=1)
    wanted = AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq
    assert torch.equal(found, wanted)
    assert family.config(flags)["rope_parameters"] == rope
    # Files of other versions have whole numbers.
    assert type(flags["rotary_base"]) is (int if rope["rope_theta"].is_integer() else float)
