"""Every family of Hugging Face models gives the same logits and the same tokens sharded as whole.

fp32, logits within 1e-5 of the largest, 32 greedy tokens equal (12 in the quick tier), with dynamic and static
caches and a batch with left padding. The reference is the library's own model in the test's process.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiers import sized
from tiny_transformers import (
    FAMILIES,
    left_padded,
    relative_error,
    tiny_model,
    tokens,
)

from helix_megatron.huggingface import make_groups, shard, sharding_of

LAYOUTS = {  # ranks, m; 8 ranks, twice as many as query heads, run in the full tier alone
    "m 2, n 1": (2, 2),
    "m 2, n 2": (4, 2),
    "m 4, n 1": (4, 4),
    "m 4, n 2": (8, 4),
}
NEW_TOKENS = sized("conversion", full=32, quick=12)
CACHES = ("dynamic", "static")


def sharded(family: str, m: int, *, tensor_parallel_size: int | None = None, **options: Any) -> Any:
    """A tiny model, cut over all ranks of the pool."""
    groups = make_groups(tensor_parallel_size or dist.get_world_size(), m)
    changes = options.pop("changes", {})
    return shard(
        tiny_model(family, **changes),
        m if "exchange" not in options else {"intra_head_parallel_size": m, **_pop_helix(options)},
        tensor_group=groups.tensor,
        intra_head_group=groups.intra_head,
        **options,
    )


def _pop_helix(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options.pop(name) for name in ("exchange", "query_layout") if name in options}


@torch.no_grad()
def outputs(model: Any, new_tokens: int = NEW_TOKENS, caches: tuple[str, ...] = CACHES) -> dict:
    """Logits of a full and of a left-padded batch, and the tokens that are generated from the latter."""
    ids, mask = left_padded()
    found = {
        "logits": model(tokens()).logits,
        "padded": model(ids, attention_mask=mask).logits[mask.bool()],
    }
    for cache in caches:
        found[cache] = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation=cache,
        )
    return found


@functools.cache
def reference(family: str) -> dict[str, torch.Tensor]:
    return outputs(tiny_model(family))


def run_outputs(family: str, m: int, **options: Any) -> dict[str, torch.Tensor]:
    return outputs(sharded(family, m, **options))


def assert_same(ranks: list[dict], wanted: dict) -> None:
    for found in ranks:
        for name, value in found.items():
            if value.is_floating_point():
                assert relative_error(value, wanted[name]) <= 1e-5, name
            else:
                assert torch.equal(value, wanted[name]), name


@pytest.mark.filterwarnings("ignore:each rank has")
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        # The quick tier has every third pair of 2 and 4 ranks: each family once, each layout several times.
        pytest.param(
            family, layout, marks=[pytest.mark.full("conversion")] * ((i + j) % 3 > 0 or j == 3)
        )
        for i, family in enumerate(FAMILIES)
        for j, layout in enumerate(LAYOUTS)
    ],
)
def test_logits_and_tokens_equal_those_of_the_whole_model(pool, family, layout):
    """The point of it all. The tiny models are random in every parameter, so nothing can be dropped unseen."""
    wanted = reference(family)
    assert wanted["dynamic"].size(1) == 12 + NEW_TOKENS
    assert len(set(wanted["dynamic"].flatten().tolist())) > 8, "the tokens must tell models apart"
    world_size, m = LAYOUTS[layout]
    assert_same(pool.run(run_outputs, family, m, world_size=world_size, timeout=120), wanted)


def run_options(cases: dict[str, tuple[str, int, dict]]) -> dict[str, dict]:
    return {
        name: outputs(sharded(family, m, **options), 4, ("dynamic",))
        for name, (family, m, options) in cases.items()
    }


OPTIONS: dict[str, tuple[str, int, dict]] = {
    "tensor parallelism alone, m 1": ("llama", 1, {}),
    "whole embeddings": ("gemma", 2, {"embeddings": False}),
    "whole MLPs": ("mixtral", 2, {"mlp": False}),
    "score-reduce": ("qwen3", 2, {"exchange": "score-reduce"}),
    "gather-qk": ("mistral", 2, {"exchange": "gather-qk"}),
    "all-to-all": ("llama", 2, {"exchange": "all-to-all-batch"}),
    "whole queries asked for": ("qwen2", 2, {"exchange": "gather-kv", "query_layout": "heads"}),
}


def test_options_change_nothing_in_the_result(pool):
    """What is cut, and how segments meet, are choices of speed and memory."""
    ranks = pool.run(run_options, OPTIONS, world_size=2, timeout=120)
    for name, (family, _, _) in OPTIONS.items():
        wanted = dict(reference(family))
        wanted["dynamic"] = wanted["dynamic"][:, : 12 + 4]
        assert_same([rank[name] for rank in ranks], wanted)


def run_caches(family: str, m: int) -> dict[str, Any]:
    from transformers import DynamicCache, StaticCache

    model = sharded(family, m)
    shapes = {}
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=20),
    ):
        with torch.no_grad():
            model(tokens(), past_key_values=cache, use_cache=True)
        layer = cache.layers[0]
        shapes[type(cache).__name__] = (tuple(layer.keys.shape), tuple(layer.values.shape))
    return shapes


def test_caches_hold_segments(pool):
    """A cache that held whole heads would cost m times the memory, and no rank may hold a head twice."""
    for shapes in pool.run(run_caches, "llama", 2, world_size=4, timeout=60):
        # 2 key-value heads of 16 on n = 2 groups of m = 2: one head's half of each.
        assert shapes["DynamicCache"] == ((2, 1, 12, 8), (2, 1, 12, 8))
        assert shapes["StaticCache"] == ((2, 1, 20, 8), (2, 1, 20, 8))


def run_masks(m: int) -> dict[str, torch.Tensor]:
    return masked_outputs(sharded("llama", m))


@torch.no_grad()
def masked_outputs(model: Any) -> dict[str, torch.Tensor]:
    """Logits under masks that a caller makes, and in two steps over one cache."""
    ids = tokens()
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    seen[:, 3] = False
    seen[3, 3] = True
    boolean = seen[None, None].expand(2, 1, 12, 12)
    additive = torch.zeros(boolean.shape).masked_fill(~boolean, torch.finfo(torch.float32).min)
    first = model(ids[:, :7], use_cache=True)
    second = model(ids[:, 7:], past_key_values=first.past_key_values)
    return {
        "boolean": model(ids, attention_mask=boolean).logits,
        "additive": model(ids, attention_mask=additive).logits,
        "in two steps": torch.cat([first.logits, second.logits], dim=1),
    }


def test_masks_of_the_caller_and_chunks_over_a_cache(pool):
    """Keys may outnumber queries, and a mask may be any pattern; additive ones must read as boolean ones do."""
    wanted = masked_outputs(tiny_model("llama"))
    assert relative_error(wanted["boolean"], wanted["in two steps"]) > 1e-2, (
        "the mask must do something"
    )
    assert_same(pool.run(run_masks, 2, world_size=2, timeout=60), wanted)


def run_neighbours(m: int) -> dict[str, Any]:
    config = tiny_model("llama").config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    whole, model = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    groups = make_groups(dist.get_world_size(), m)
    shard(model, m, tensor_group=groups.tensor)  # makes the intra-head group itself
    return {
        "same configuration object": whole.config is config,
        "implementation": (whole.config._attn_implementation, model.config._attn_implementation),
        "heads": (model.config.num_attention_heads, model.config.num_key_value_heads),
        "sharding": sharding_of(whole),
        "intra-head ranks": dist.get_process_group_ranks(model.sharding.intra_head_group),
    }


def test_other_models_are_left_alone(pool):
    """Two models may share a configuration object; sharding one must not change the other's attention."""
    for rank, found in enumerate(pool.run(run_neighbours, 2, world_size=4, timeout=60)):
        assert found["same configuration object"]
        assert found["implementation"] == ("sdpa", "sdpa")
        assert found["heads"] == (4, 2)
        assert found["sharding"] is None
        assert found["intra-head ranks"] == ([0, 1] if rank < 2 else [2, 3])


def run_one_rank() -> list:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    groups = make_groups(1, 1)
    shard(model, 1, tensor_group=groups.tensor, intra_head_group=groups.intra_head)
    same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return [same, types == [type(m) for m in model.modules()], model.config._attn_implementation]


def test_one_rank_is_the_library_unchanged(pool):
    """Switched off must mean the host's own code, not a slower equal."""
    assert pool.run(run_one_rank, world_size=2, timeout=60)[0] == [True, True, "sdpa"]
