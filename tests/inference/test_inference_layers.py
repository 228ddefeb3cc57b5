"""The engine with layers that have sinks, or windows in some; and with layers that nobody has seen yet."""

from __future__ import annotations

from typing import Any

import inference_models as models
import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_inference_engine import (
    SHORT,
    assert_equal,
    logits_of_all_caches,
    logits_without_cache,
)
from test_inference_transformers import make_runner
from tomorrow import TomorrowAttention, tomorrow

from helix_megatron.core.caches import NAMES
from helix_megatron.core.caches.windows import Reach
from helix_megatron.errors import HelixError
from helix_megatron.inference.runner import Pools
from helix_megatron.inference.step import StepPlan


def with_sinks(work: str, text: str, dtype: torch.dtype, world_size: int) -> Any:
    """Logits of a model whose softmax has learned sinks, which no flag asks for."""

    from helix_megatron.megatron import gpt

    kept, build = gpt.transformer_config, models.build

    def config_with_sinks(run: Any) -> Any:
        config = kept(run)
        config.softmax_type = "learnable"
        return config

    def build_with_sinks(*arguments: Any) -> tuple[Any, Any]:
        run, model = build(*arguments)
        for number, layer in enumerate(model.decoder.layers):
            offset = layer.self_attention.core_attention.softmax_offset
            heads = list(run.layout.query_heads(dist.get_rank()))
            assert offset.numel() == len(heads)
            offset.data = torch.linspace(-1, 2, 4, dtype=offset.dtype)[heads] + number
        return run, model

    gpt.transformer_config, models.build = config_with_sinks, build_with_sinks
    try:
        if work == "cached":
            return logits_of_all_caches(text, world_size, dtype)
        return logits_without_cache(text, dtype, world_size)
    finally:
        gpt.transformer_config, models.build = kept, build


def test_learned_sinks_are_those_of_the_model(pool):
    """Each rank has the sinks of its own heads; the keeper of a sequence needs those of all."""
    text = models.flags(*models.HEADS["GQA"], ranks=2, segments=2)
    cached = pool.run(with_sinks, "cached", text, torch.float64, 2, world_size=2)
    alone = models.flags(*models.HEADS["GQA"])
    full = pool.run(with_sinks, "full", alone, torch.float64, 1, world_size=1)[0]
    plain = pool.run(logits_without_cache, alone, torch.float64, world_size=1)[0]
    assert abs(full[0] - plain[0]).max() > 1e-3 * abs(plain[0]).max(), "sinks without effect"
    assert set(cached[0]) == set(NAMES)
    for found in cached[0].values():
        assert_equal(found, full)


@pytest.mark.parametrize(
    "cache", ["batch", pytest.param("sequence", marks=pytest.mark.full("inference"))]
)
def test_layers_with_windows_free_their_pages(pool, cache):
    """Every second layer sees 5 positions back: 24 pages for it, where 5 sequences of 25 to 88 have 36."""
    more = "--window-size 5 --window-attn-skip-freq 2"
    text = models.flags(*models.HEADS["GQA"], ranks=4, segments=2, more=more)
    pools = Pools(400, 12, Reach(5, 32))
    answers = pool.run(
        models.generate, text, 4, cache, models.prompts(), SHORT, pages=pools, world_size=4
    )
    alone = models.flags(*models.HEADS["GQA"], more=more)
    expected = pool.run(models.greedy_without_cache, alone, models.prompts(), 24, world_size=1)[0]
    assert answers[0]["tokens"] == expected
    assert answers[0]["stats"].preemptions == 0
    assert [answer["left"] for answer in answers] == [0] * 4


class LeakyAttention(TomorrowAttention):
    """Every token sees the mean of all that are computed together."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(*args, **kwargs)
        return output + kwargs["hidden_states"].mean(1, keepdim=True), weights


def logits_of_tomorrow(attention: type[TomorrowAttention]) -> tuple[Any, Any] | str:
    """Logits of a step of two ranks, and of the library's model; or what is said of it."""
    model = tomorrow(attention)
    tokens = np.arange(20) % 13
    with torch.no_grad():
        alone = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0, -1]
    try:
        runner = make_runner(model, "sequence")
    except HelixError as error:
        return str(error)
    piece = models.piece_of(models.book_of(runner, 20), 0, 0, tokens)
    found = runner.run(StepPlan(pieces=(piece,)))
    return (alone, found[0]) if dist.get_rank() == 0 else (alone, alone)


@pytest.mark.filterwarnings("ignore:models of type tomorrow")
def test_a_type_of_tomorrow_is_served_or_found_out(pool):
    """By the form of its modules. What sees another sequence is refused: logits are compared at start."""
    alone, found = pool.run(logits_of_tomorrow, TomorrowAttention, world_size=2)[0]
    assert (found - alone).abs().max() <= 1e-5 * alone.abs().max()
    for said in pool.run(logits_of_tomorrow, LeakyAttention, world_size=1):
        assert "gives other logits in the engine than by itself" in said
