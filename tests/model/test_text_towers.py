"""The text of models that see converts by itself, and comes back as a text model.

The oracle is `transformers`' whole model, given no picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import EXPERTS, MIXED, SIZE, read_config, tokens
from test_families import LAYOUTS, TOLERANCE, logits_of_rank

from helix_megatron import cli

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 1e6}

# name: (class of the configuration, its text, its vision, more)
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3Config",
        SIZE | MIXED | {"head_dim": 16},
        VISION,
        {"mm_tokens_per_image": 4},
    ),
    "mistral3": (
        "Mistral3Config",
        SIZE | {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
        VISION | {"model_type": "pixtral", "head_dim": 8},
        {},
    ),
    "llama4": (
        "Llama4Config",
        SIZE
        | EXPERTS
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 56,
            "no_rope_layer_interval": 2,
        },
        VISION
        | {
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        {},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        SIZE | {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
        QWEN_VISION,
        {},
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        SIZE | {"head_dim": 16, "rope_parameters": MROPE | {"mrope_section": [2, 3, 3]}},
        QWEN_VISION | {"deepstack_visual_indexes": [0]},
        {},
    ),
}


def save_tower(name: str, directory: Path) -> torch.Tensor:
    """Write the whole model; its logits [2, s, V] of `tokens()` alone."""
    import transformers

    kind, text, vision, more = TOWERS[name]
    config = getattr(transformers, kind)(text_config=text, vision_config=vision, **more)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            start = parameter.detach().clone() if parameter.dim() == 1 else 0
            parameter.data.normal_(std=0.2).add_(start)
    model.eval().save_pretrained(directory)
    with torch.no_grad():
        if name == "llama4":  # of 5.24, whose whole model looks for pictures in what it gives
            model = model.language_model
        return model(input_ids=tokens(), use_cache=False).logits


@pytest.mark.filterwarnings("ignore:.* sequences of more than")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.full("conversion")] * (name not in ("gemma3", "qwen3_vl"))
        )
        for name in TOWERS
    ],
)
def test_the_text_of_a_model_that_sees(pool, tmp_path, name):
    """The models of 2026 are published with towers; whoever trains or serves their text needs none of these."""
    from transformers import AutoModelForCausalLM

    wanted = save_tower(name, tmp_path / "hf")
    assert wanted.abs().max() > 1
    for layout in ("1 rank", "4 ranks, m 2"):
        parallel = LAYOUTS[layout]
        ranks = parallel.get("tensor_model_parallel_size", 1)
        found = pool.run(logits_of_rank, str(tmp_path / "hf"), {}, parallel, world_size=ranks)
        for logits in found:
            assert (logits - wanted).abs().max() / wanted.abs().max() <= TOLERANCE
    with pytest.warns(UserWarning, match=r"tensors are not of the model's text, and are left out"):
        cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "store"), "--to", "canonical"])
    paths = (str(tmp_path / "store"), str(tmp_path / "text"))
    assert cli.main(["convert", *paths, "--to", "huggingface", "--verify"]) == 0
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    with torch.no_grad():
        assert torch.equal(text(tokens(), use_cache=False).logits, wanted)
    assert "vision_config" not in read_config(tmp_path / "text")
