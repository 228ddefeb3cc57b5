"""Models that see are cut by form as well: their text by heads, MLPs of either part by their intermediate size.

The oracle is the library's own model in one process, with a picture among the tokens where it is Qwen's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_transformers import randomize, relative_error

from helix_megatron.huggingface import make_groups, shard

sys.path.append(str(Path(__file__).parents[1] / "model"))
from test_text_towers import TOWERS

PICTURE = 90  # the token that stands for a picture
NAMES = [name for name in TOWERS if name != "llama4"]  # whose whole model does not run in 5.24


def model_of(name: str) -> Any:
    import transformers

    kind, text, vision, more = TOWERS[name]
    if name.startswith("qwen"):
        more = more | {"image_token_id": PICTURE}
    torch.manual_seed(3)
    config = getattr(transformers, kind)(text_config=text, vision_config=vision, **more)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    randomize(model)
    return model.eval()


def inputs(name: str, model: Any) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(3, PICTURE, (1, 12), generator=random)
    if not name.startswith("qwen"):
        return {"input_ids": ids}
    vision = model.config.vision_config
    merged = vision.spatial_merge_size
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids[0, 4] = PICTURE
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(merged**2, size, generator=random),
        "image_grid_thw": torch.tensor([[1, merged, merged]]),
        "mm_token_type_ids": (ids == PICTURE).int(),
    }


def results(name: str, model: Any) -> dict[str, torch.Tensor]:
    given = inputs(name, model)
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits
        tokens = model.generate(**given, max_new_tokens=6, do_sample=False)
    return {"logits": logits, "tokens": tokens}


def run_sharded(name: str, m: int) -> dict[str, torch.Tensor]:
    groups = make_groups(dist.get_world_size(), m)
    model = model_of(name)
    shard(model, m, tensor_group=groups.tensor, intra_head_group=groups.intra_head)
    return results(name, model)


@pytest.mark.filterwarnings("ignore:.* stay whole on every rank:UserWarning")
@pytest.mark.parametrize(
    ("name", "ranks", "m"),
    [
        pytest.param(
            name,
            ranks,
            m,
            marks=[pytest.mark.full("conversion")] * ((name, ranks) != ("qwen3_vl", 2)),
        )
        for name in NAMES
        for ranks, m in ((2, 2), (4, 2))
    ],
)
def test_a_model_that_sees_equals_the_whole_model(pool, name, ranks, m):
    """Attention that looks both ways, of pictures, must stay whole, and that of text be cut."""
    wanted = results(name, model_of(name))
    for found in pool.run(run_sharded, name, m, world_size=ranks, timeout=300):
        assert relative_error(found["logits"], wanted["logits"]) <= 1e-5
        assert torch.equal(found["tokens"], wanted["tokens"])
