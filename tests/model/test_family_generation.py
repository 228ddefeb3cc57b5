"""Converted families generate the tokens that transformers does, through paged caches on several ranks.

The oracle is `transformers`: a forward pass over the whole sequence for each token, without a cache.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from hf_models import MODELS, load, save, tokens

from helix_megatron import cli
from helix_megatron.inference.arguments import add_checkpoint_arguments, inference_config
from helix_megatron.model.families import FAMILIES

PROMPTS, NEW_TOKENS = (5, 17), 12
# Of the new families those with an option of their own in the engine.
QUICK = {"smollm3", "gemma3", "llama4", "minimax m2", "olmo3", "gpt oss"}


def config_of(path: str, world_size: int) -> Any:
    parser = add_checkpoint_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return inference_config(vars(parser.parse_args(["--load", path])), world_size)


def generated(path: str) -> list[list[int]] | None:
    """Greedy tokens for two prompts of different lengths, on rank 0."""
    import torch.distributed as dist
    from inference_models import Collected

    from helix_megatron.inference.batching_flags import EngineOptions
    from helix_megatron.inference.engine import follow
    from helix_megatron.inference.request import Request, Sampling
    from helix_megatron.inference.start import start

    options = EngineOptions(max_context=64, page_size=4, cache_memory=0.001)
    runner, engine = start(config_of(path, dist.get_world_size()), options, max_waiting=8)
    if engine is None:
        follow(runner)
        return None
    collected = [Collected() for _ in PROMPTS]
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0)
    engine.submit(
        [
            Request(tuple(tokens()[row, :length].tolist()), sampling, listener)
            for row, (length, listener) in enumerate(zip(PROMPTS, collected, strict=True))
        ]
    )
    engine.stop()
    engine.run()
    return [one.tokens for one in collected]


@torch.no_grad()
def expected(path: str) -> list[list[int]]:
    model = load(path)
    answers = []
    for row, length in enumerate(PROMPTS):
        ids = tokens()[row : row + 1, :length]
        for _ in range(NEW_TOKENS):
            logits = model(ids, use_cache=False).logits[:, -1:]
            ids = torch.cat([ids, logits.argmax(-1)], dim=1)
        answers.append(ids[0, length:].tolist())
    return answers


@pytest.mark.filterwarnings("ignore:.* sequences of more than")
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=[pytest.mark.full("conversion")] * (not quick))
        for name in MODELS
        for ranks in (1, 4)
        for quick in [name in QUICK and ranks == 4]
    ],
)
def test_converted_families_generate_what_transformers_does(pool, tmp_path, name, ranks):
    """Whatever an engine leaves out of a layer shows in some token."""
    save(name, tmp_path)
    found = pool.run(generated, str(tmp_path), world_size=ranks, timeout=300)[0]
    wanted = expected(str(tmp_path))
    assert found == wanted
    assert len({tuple(one) for one in wanted}) == len(PROMPTS)


# Whose checkpoints are read as Hugging Face models; those of the others are tests/inference's.
BEYOND = [name for name, (kind, _) in MODELS.items() if not FAMILIES[kind].runs_in_engine]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=[pytest.mark.full("conversion")] * (not quick))
        for name in BEYOND
        for ranks in (1, 2)
        for quick in [(name, ranks) == ("qwen3 next", 2)]
    ],
)
def test_checkpoints_generate_what_their_model_does(pool, tmp_path, name, ranks):
    """Straight from a checkpoint, of layers that megatron-core trains and the engine does not know."""
    paths = [str(tmp_path / "hf"), str(tmp_path / "store")]
    save(name, tmp_path / "hf")
    assert cli.main(["convert", *paths, "--to", "canonical"]) == 0
    files, checkpoint = (pool.run(generated, path, world_size=ranks, timeout=300) for path in paths)
    assert files == checkpoint
    assert len({tuple(one) for one in checkpoint[0]}) == len(PROMPTS)
