"""docs/planner.md's memory of hybrid and latent models is what the code that serves them holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers

from helix_megatron.plan.published_sizes import CONFIGS

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import rank_memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* stay whole on every rank"),
    pytest.mark.skipif(
        not hasattr(transformers.DynamicCache, "has_previous_state"),
        reason="early transformers 5 keeps states in caches of each model's own",
    ),
]


QWEN, NEMOTRON = "qwen3.5-397b-a17b", "nemotron-3-super"


@pytest.mark.parametrize(
    ("name", "layers", "ranks"),
    [
        (QWEN, {"num_hidden_layers": 4}, 8),
        (NEMOTRON, {"hybrid_override_pattern": "MM*"}, 16),  # two ranks have heads of one group
        *(
            pytest.param(*case, marks=pytest.mark.full("conversion"))
            for case in (
                (QWEN, {"num_hidden_layers": 8}, 16),
                (NEMOTRON, {"hybrid_override_pattern": "MEM*E"}, 8),
            )
        ),
    ],
)
def test_planned_is_as_run(name, layers, ranks):
    """Some layers at full width: the plan's bytes are those of the model and of the engine."""
    settings = CONFIGS[name] | layers
    run = rank_memory.as_run(settings, ranks)
    planned = rank_memory.as_planned(settings, ranks, run.segments)
    assert run.segments == ranks // 2
    assert planned.cache == run.cache
    assert planned.weights == pytest.approx(run.weights, rel=1e-4)


def test_latents_are_kept_once():
    """DeepSeek-V3: 576 numbers of a position and layer, on all ranks together."""
    settings = CONFIGS["deepseek-v3"] | {"num_hidden_layers": 4}
    run = rank_memory.as_run(settings, 8)
    assert run.cache * 8 == 2 * 576 * 4 * rank_memory.CONTEXT
    assert rank_memory.as_planned(settings, 8, 1).cache == run.cache


@pytest.mark.full("conversion")
def test_the_page_has_the_table_of_today():
    """`python scripts/rank_memory.py` writes it."""
    assert rank_memory.PAGE.read_text() == rank_memory.page()
