"""Models that the code of `transformers` computes: the engine's tokens and logits are the library's own.

The oracle is the library's whole model in one process, with its own cache and its own attention. Latent
attention is held to fp64, where the library's few fp32 steps are made in fp64, too.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import inference_models as models
import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_inference_engine import plans
from test_inference_load import Wide
from tiny_transformers import BY_FORM, VOCABULARY, tiny_model
from waiting import run_python

from helix_megatron.core.caches import cache_layout
from helix_megatron.core.caches.windows import Reach
from helix_megatron.core.meter import EXCHANGE, measure
from helix_megatron.errors import HelixError
from helix_megatron.inference.request import Capacity, Request, Sampling
from helix_megatron.inference.runner import Pools
from helix_megatron.inference.step import StepPlan

COUNT = 32
PAGE = 4
LENGTHS = (1, 3, 17, 40)
CACHES = ("batch", "sequence")
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8}
LATENT = ("deepseek_v2", "deepseek_v3")
# In the quick tier: soft caps, layers of other heads, values narrower than keys. Sinks, windows, latents and
# states have tests of their own below.
QUICK = ("gemma2", "gemma4", "mimo_v2_flash")


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCABULARY, (n,), generator=random).tolist() for n in lengths]


def built(family: str, dtype: torch.dtype, **changes: Any) -> Any:
    model = tiny_model(family, dtype=dtype, **changes)
    if dtype is torch.float64 and hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped products have no fp64
    return model


@functools.cache
def greedy(family: str, count: int = COUNT, **changes: Any) -> list[list[int]]:
    """The library's tokens, of one process and one prompt at a time."""
    model = built(family, torch.float32, **changes)
    with torch.no_grad():
        return [
            model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            for prompt in prompts()
        ]


def make_runner(model: Any, cache: str, pages: Any = 200, m: int | None = None) -> Any:
    """A runner of a model that every rank has made whole, cut for all of them."""
    from helix_megatron.huggingface import make_groups, shard
    from helix_megatron.inference.transformers_load import described
    from helix_megatron.inference.transformers_runner import PagedModel, TransformersRunner

    ranks = dist.get_world_size()
    facts = described(model)
    segments = facts.segments(ranks, m or "auto")
    groups = make_groups(ranks, segments)
    shard(model, segments, tensor_group=groups.tensor, intra_head_group=groups.intra_head)
    shared = groups.tensor if facts.latent_dim else groups.intra_head
    paged = PagedModel(model, list(facts.attention), facts.recurrent, groups.tensor, shared)
    layout = facts.layout(ranks, segments)
    sizes = {"cache": cache, "pages": pages, "page_size": PAGE, "vocab_size": VOCABULARY}
    return TransformersRunner(paged, layout, **sizes)


def generate(family: str, cache: str, pages: Any = 200, m: int | None = None) -> dict[str, Any]:
    """Rank 0's tokens of all prompts, computed together: chunks of prompts beside tokens of others."""
    from helix_megatron.inference.engine import Engine, follow
    from helix_megatron.inference.runner import make_book
    from helix_megatron.inference.scheduler import Scheduler

    runner = make_runner(built(family, torch.float32), cache, pages, m)
    used = {"bytes": sum(pool.untyped_storage().nbytes() for pool in pools(runner))}
    if dist.get_rank():
        follow(runner)
        return used | {"left": len(runner.tables[0])}
    book = make_book(cache, runner.members, pages, PAGE, shares=not runner.model.recurrent)
    engine = Engine(runner, Scheduler(book, 8, 16), Capacity(VOCABULARY, 128, 8, 8))
    heard = [models.Collected() for _ in LENGTHS]
    sampling = Sampling(max_tokens=COUNT, temperature=0)
    engine.submit(
        [Request(tuple(p), sampling, one) for p, one in zip(prompts(), heard, strict=True)]
    )
    engine.stop()
    engine.run()
    stats = engine.stats()
    found = {"tokens": [one.tokens for one in heard], "preemptions": stats.preemptions}
    return used | found | {"left": stats.pages_used}


def pools(runner: Any) -> list[torch.Tensor]:
    """Each storage of the cache once."""
    every = {pool.untyped_storage().data_ptr(): pool for pool in runner.cache.k + runner.cache.v}
    return list(every.values())


def several(cases: list[tuple[str, str]], **options: Any) -> list[dict[str, Any]]:
    """`generate` of one case after the other, in the same processes."""
    return [generate(family, cache, **options) for family, cache in cases]


CASES = [
    pytest.param(family, ranks, marks=[pytest.mark.full("inference")] * (quick != ranks))
    for place, family in enumerate(sorted(BY_FORM))
    for ranks in (1, 2, 4)
    for quick in [(2, 4)[place % 2] if family in QUICK else 0]
]


@pytest.mark.filterwarnings("ignore:each rank has", "ignore:.* stay whole on every rank")
@pytest.mark.parametrize(("family", "ranks"), CASES)
def test_greedy_tokens_are_those_of_the_library(pool, family, ranks):
    """Windows, sinks, soft caps, scales by position, kinds of heads side by side; both cache layouts."""
    caches = CACHES if ranks > 1 else ("batch",)
    found = pool.run(several, [(family, cache) for cache in caches], world_size=ranks)
    for place, cache in enumerate(caches):
        assert found[0][place]["tokens"] == greedy(family), cache
        assert [one[place]["left"] for one in found] == [0] * ranks, "pages left behind"


@pytest.mark.parametrize(
    ("family", "m"),
    [
        ("gpt_oss", 2),
        ("qwen3_next", 2),
        ("falcon_h1", 2),
        *(
            pytest.param(family, m, marks=pytest.mark.full("inference"))
            for family, m in (
                ("deepseek_v3", None),
                *((hybrid, 2) for hybrid in ("qwen3_5", "nemotron_h", "bamba", "granitemoehybrid")),
                *((hybrid, 4) for hybrid in ("qwen3_5", "nemotron_h", "falcon_h1")),
            )
        ),
    ],
)
def test_preempted_sequences_get_the_same_tokens(pool, family, m):
    """Pages for one long sequence and little more: the others are computed anew, states of layers included.

    Chunks of prompts are computed beside tokens of others, so that all 128 tokens come of all three at once.
    """
    ranks = m or 2
    found = pool.run(several, [(family, "sequence")], pages=28 // ranks, m=m, world_size=ranks)
    assert found[0][0]["tokens"] == greedy(family)
    assert found[0][0]["preemptions"] > 0
    assert [one[0]["left"] for one in found] == [0] * ranks


@pytest.mark.parametrize(
    "cache", ["sequence", pytest.param("batch", marks=pytest.mark.full("inference"))]
)
def test_windows_free_their_pages(pool, cache):
    """28 pages of 4 ranks for the layers with windows, where 4 sequences have 49: nothing is computed anew."""
    pools = Pools(200, 14, Reach(5, 16))
    found = pool.run(several, [("gpt_oss", cache)], pages=pools, m=2, world_size=4)
    assert found[0][0]["tokens"] == greedy("gpt_oss")
    assert found[0][0]["preemptions"] == 0
    assert [one[0]["left"] for one in found] == [0] * 4


def test_layers_that_attend_to_keys_of_others_have_no_pages(pool):
    """Four layers, the last two with the keys of the first two: 2 heads of 16, and 2 of 32 dimensions."""
    found = pool.run(several, [("gemma4, shared keys", "batch")], m=2, world_size=2)
    assert found[0][0]["tokens"] == greedy("gemma4, shared keys")
    assert [one[0]["bytes"] for one in found] == [200 * PAGE * 2 * (16 + 32) * 2 * 4] * 2


def test_contexts_end_where_rotary_embedding_would_change():
    """Keys are kept as they were turned: dynamic rope turns them anew beyond the positions of training."""
    from helix_megatron.inference.transformers_load import described

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
    facts = described(tiny_model("hunyuan", rope_parameters=rope))
    assert (facts.longest, "dynamic turns the keys" in facts.bound) == (128, True)


# ------------------------------------------------------------------------------ latents


def logits_of_steps(family: str) -> dict[str, list[np.ndarray] | None]:
    """Logits in fp64 after every piece, sequence by sequence, of each cache layout; None but on rank 0."""
    found: dict[str, list[np.ndarray] | None] = {}
    for cache in CACHES if dist.get_world_size() > 1 else ("batch",):
        runner = make_runner(built(family, torch.float64, **EIGHT), cache)
        rows: list[list[Any]] = [[] for _ in STEPS]
        book = models.book_of(runner, 200)
        for plan in plans(STEPS, prompts((30, 24, 40)), book):
            with Wide():
                logits = runner.run(plan)
            for piece, row in zip(plan.pieces, () if logits is None else logits, strict=False):
                rows[piece.sequence].append(row.numpy())
        found[cache] = [np.stack(row) for row in rows] if rows[0] else None
    return found


STEPS = (5, 1, 19)  # of each prompt the first chunk; then 3 tokens, then one by one


@functools.cache
def logits_of_the_library(family: str) -> list[np.ndarray]:
    """The same positions from one pass over each sequence, without a cache: keys and values expanded."""
    model = built(family, torch.float64, **EIGHT)
    found = []
    with torch.no_grad(), Wide():
        for first, row in zip(STEPS, prompts((30, 24, 40)), strict=True):
            ends = np.asarray([first, first + 3, *range(first + 4, len(row) + 1)])
            found.append(model(torch.tensor([row]), use_cache=False).logits[0, ends - 1].numpy())
    return found


@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        pytest.param(family, ranks, marks=[pytest.mark.full("inference")] * (ranks != quick))
        for family, quick in zip(LATENT, (2, 4), strict=True)
        for ranks in (1, 2, 4, 8)
    ],
)
def test_absorbed_latents_equal_expanded_ones_in_fp64(pool, family, ranks):
    """One key of 24 dimensions, whose first 16 are the value, for all 8 heads on every number of ranks."""
    wanted = logits_of_the_library(family)
    scale = max(abs(rows).max() for rows in wanted)
    found = pool.run(logits_of_steps, family, world_size=ranks)[0]
    for cache, logits in found.items():
        for rows, right in zip(logits, wanted, strict=True):
            assert rows.dtype == np.float64
            assert abs(rows - right).max() <= 1e-10 * scale, cache


def bytes_of_latents(cache: str, positions: int, count: int) -> tuple[int, int]:
    """(bytes of this rank's pool, bytes of the pages in use on all ranks) after some sequences."""
    runner = make_runner(built("deepseek_v3", torch.float32), cache, pages=64)
    book = models.book_of(runner, 64)
    pieces = [models.piece_of(book, number, 0, [1] * positions) for number in range(count)]
    runner.run(StepPlan(pieces=tuple(pieces)))
    return sum(p.untyped_storage().nbytes() for p in pools(runner)), (
        book.used * runner.cache.page_bytes[0]
    )


@pytest.mark.parametrize("cache", CACHES)
def test_latents_are_kept_once(pool, cache):
    """4 sequences of 60 positions, 2 layers, 24 numbers of 4 bytes: on 4 ranks as many bytes as on one."""
    found = pool.run(bytes_of_latents, cache, 60, 4, world_size=4)
    position = 2 * 24 * 4
    for pool_bytes, used in found:
        assert used == 4 * 60 * position
        assert pool_bytes == 64 * PAGE * position


def bytes_of_a_token(cache: str, context: int) -> tuple[int, Any]:
    """Bytes that this rank sends in attention for one token of each of 4 sequences; what they are held to."""
    runner = make_runner(built("deepseek_v3", torch.float32), cache)
    book = models.book_of(runner, 200)
    pieces = [models.piece_of(book, number, context, [1]) for number in range(4)]
    with measure() as meter:
        runner.run(StepPlan(pieces=tuple(pieces)))
    return meter.bytes(EXCHANGE), runner.model.shape(runner.layout, 4, context + 1, 4)


@pytest.mark.parametrize("cache", CACHES)
def test_bytes_of_a_token_are_those_of_the_cost_model(pool, cache):
    """Queries of the latents, and sums of them; of the latents themselves nothing is sent."""
    found = pool.run(bytes_of_a_token, cache, 50, world_size=4)
    shape = found[0][1]
    assert (shape.latent, shape.value_dim, shape.key_value_bytes) == (True, 16, 0)
    assert sum(sent for sent, _ in found) == 2 * 4 * cache_layout(cache).bytes(shape)
    assert shape.cache_bytes() == 4 * 51 * 24 * 4


@pytest.mark.parametrize("rank", [24, None])
def test_what_latents_cannot_do_is_said(rank):
    """Ranks are counted by query heads, and there are no segments to choose; queries may have no latent."""
    from helix_megatron.inference.transformers_load import described

    facts = described(tiny_model("deepseek_v3", q_lora_rank=rank))
    assert facts.segments(4, "auto") == 1
    assert facts.layout(4, 1).segments == 4
    with pytest.raises(HelixError, match="4 of them cannot be dealt to 8 ranks"):
        facts.segments(8, "auto")
    with pytest.raises(HelixError, match="kept once on all ranks together"):
        facts.segments(4, 2)


# ------------------------------------------------------------------------------ from files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a model with windows, sinks, narrow values and experts; no tokenizer."""
    directory = tmp_path_factory.mktemp("mimo_v2_flash")
    tiny_model("mimo_v2_flash").save_pretrained(directory)
    return directory


def options_of(directory: Any, *flags: str) -> dict[str, Any]:
    from helix_megatron.inference.command import build_parser

    return vars(build_parser().parse_args(["--load", str(directory), *flags]))


def tokens_from_files(directory: str) -> tuple[list[list[int]], str]:
    """What `helix generate` does on its ranks, here those of the pool."""
    from helix_megatron.inference.arguments import inference_config
    from helix_megatron.inference.batching_flags import EngineOptions
    from helix_megatron.inference.engine import follow
    from helix_megatron.inference.start import start

    config = inference_config(options_of(directory), dist.get_world_size())
    options = EngineOptions(page_size=PAGE, prefill_chunk=16, max_sequences=4)
    runner, engine = start(config, options, max_waiting=4, longest=80)
    if engine is None:
        follow(runner)
        return [], ""
    heard = [models.Collected() for _ in LENGTHS]
    sampling = Sampling(max_tokens=8, temperature=0)
    engine.submit(
        [Request(tuple(p), sampling, one) for p, one in zip(prompts(), heard, strict=True)]
    )
    engine.stop()
    engine.run()
    return [one.tokens for one in heard], " ".join(config.notes)


def test_a_directory_is_served(pool, saved):
    """A type that conversion does not know is computed by transformers, each rank reading its part."""
    found, notes = pool.run(tokens_from_files, str(saved), world_size=4)[0]
    assert found == [tokens[:8] for tokens in greedy("mimo_v2_flash")]
    assert "computed by the code of transformers, cut for 4 ranks" in notes
    assert "every key-value head is cut into 2 segments" in notes


def test_prompts_and_outputs_as_token_ids(saved):
    """A model without a tokenizer: ids in, ids out, in the records and as text."""
    asked = [flag for p in prompts()[:2] for flag in ("--prompt-tokens", json.dumps(p))]
    command = ["-m", "helix_megatron.cli", "generate", "--load", str(saved), *asked]
    done = run_python([*command, "--max-tokens", "8", "--json"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    records = [json.loads(line) for line in lines]
    wanted = [tokens[:8] for tokens in greedy("mimo_v2_flash")[:2]]
    assert [record["tokens"] for record in records] == wanted
    assert [record["text"].split() for record in records] == [list(map(str, w)) for w in wanted]
    assert [json.loads(record["prompt"]) for record in records] == prompts()[:2]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--num-layers", "3"], "--num-layers: the code of transformers computes this model"),
        (["--ckpt-step", "7"], "is a Hugging Face model, which has no iterations"),
        (["--helix-attention", "segment-local"], "--helix-attention: the code of transformers"),
        (
            ["--intra-head-parallel-size", "3"],
            "does not fit 4 and 2, 4 and 4 query and key-value heads",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(saved, flags, text):
    """What `config.json` says is what is computed."""
    from helix_megatron.inference.arguments import inference_config

    with pytest.raises(HelixError, match=text):
        inference_config(options_of(saved, *flags), 4)


@pytest.mark.parametrize(
    ("content", "asked", "wanted"),
    [
        ({"model_type": "llama"}, "auto", False),
        ({"model_type": "llama"}, "transformers", True),
        ({"model_type": "of tomorrow"}, "auto", True),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M*"}, "auto", True),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "megatron", False),
        ({"model_type": "qwen3_next"}, "auto", True),
        ({"model_type": "llama", "kv_lora_rank": 16}, "auto", True),
        ({"model_type": "llama", "layer_types": ["linear_attention"]}, "auto", True),
        (None, "auto", False),
    ],
)
def test_whose_code_computes_the_model(tmp_path, content, asked, wanted):
    """megatron-core's where conversion knows the model and the engine its layers, unless a flag says whose."""
    from helix_megatron.inference.arguments import _by_transformers

    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    assert _by_transformers({"load": str(tmp_path), "implementation": asked}) is wanted


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("qwen3_next", {"layer_types": ["linear_attention"]}),
        ("nemotron_h", {"hybrid_override_pattern": "M*"}),
        *((kind, {}) for kind in ("kimi_k2", "falcon_h1", "hunyuan_v1_dense", "of tomorrow")),
    ],
)
def test_megatron_does_not_compute_what_the_engine_does_not_know(tmp_path, kind, others):
    """States, latents, norms behind rotary embedding, and types that conversion does not know."""
    from helix_megatron.inference.arguments import _by_transformers

    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **others}))
    with pytest.raises(HelixError, match=f"megatron does not compute models of type {kind}"):
        _by_transformers({"load": str(tmp_path), "implementation": "megatron"})
