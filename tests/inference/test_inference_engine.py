"""The engine on real ranks: its tokens and logits are those of one process."""

from __future__ import annotations

import types
from typing import Any

import inference_models as models
import numpy as np
import pytest
import torch
from tiers import is_full

from helix_megatron.core.caches import NAMES
from helix_megatron.core.kernels.partial import unfused
from helix_megatron.inference.request import Request, Sampling
from helix_megatron.megatron.self_attention import HelixSelfAttention

GREEDY = Sampling(max_tokens=256, temperature=0)
ONE_LAYER = "--num-layers 1"
SHORT = Sampling(max_tokens=24, temperature=0)
# Of the quick tier: one cache layout of a kind of heads generates 256 tokens on 2 ranks, and each kind runs on
# one number of ranks. The full tier has all of them everywhere.
LONG = {"MHA": "batch", "GQA": "segment", "MQA": "sequence"}
QUICK = {"GQA": 2, "MHA": 4, "MQA": 8}
RANKS = [
    pytest.param(kind, ranks, marks=[pytest.mark.full("inference")] * (QUICK[kind] != ranks))
    for kind in models.HEADS
    for ranks in (2, 4, 8)
]
# Segments for 2, 4 and 8 ranks: as few as the key-value heads allow, so that all three kinds of cut appear.
SEGMENTS = {"MHA": {2: 2, 4: 2, 8: 2}, "GQA": {2: 2, 4: 2, 8: 4}, "MQA": {2: 2, 4: 4, 8: 8}}


@pytest.fixture(scope="module")
def reference(pool) -> Any:
    """Tokens of stock megatron-core in one process, without any cache, by kind of attention."""
    known: dict[tuple[str, int], list[list[int]]] = {}

    def of(kind: str, count: int) -> list[list[int]]:
        if (kind, count) not in known:
            flags = models.flags(*models.HEADS[kind], more=ONE_LAYER)
            known[kind, count] = pool.run(
                models.greedy_without_cache, flags, models.prompts(), count, world_size=1
            )[0]
        return known[kind, count]

    return of


def three_caches(text: str, world_size: int, samplings: dict[str, Sampling]) -> dict[str, Any]:
    """One run after the other in the same processes."""
    from helix_megatron import parallel_state

    found = {}
    for cache, sampling in samplings.items():
        found[cache] = models.generate(text, world_size, cache, models.prompts(), sampling)
        parallel_state.destroy_model_parallel()
    return found


def samplings_of(kind: str, ranks: int) -> dict[str, Sampling]:
    """What each cache layout generates in this tier."""
    if is_full("inference"):
        return dict.fromkeys(NAMES, GREEDY)
    long = LONG[kind] if (kind, ranks) == ("GQA", 2) else None
    caches = NAMES if ranks < 8 else (LONG[kind],)
    return {cache: GREEDY if cache == long else SHORT for cache in caches}


@pytest.mark.parametrize(("kind", "ranks"), RANKS)
def test_256_greedy_tokens_are_those_of_one_process(pool, reference, kind, ranks):
    """Every cache layout, prompts of mixed lengths, one token of which every step depends on all before.

    On 8 ranks the quick tier has one layout.
    """
    samplings = samplings_of(kind, ranks)
    expected = reference(kind, max(sampling.max_tokens for sampling in samplings.values()))
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "prompts that say the same"
    segments = SEGMENTS[kind][ranks]
    text = models.flags(*models.HEADS[kind], ranks=ranks, segments=segments, more=ONE_LAYER)
    answers = pool.run(three_caches, text, ranks, samplings, world_size=ranks)
    for cache, sampling in samplings.items():
        count = sampling.max_tokens
        assert answers[0][cache]["tokens"] == [tokens[:count] for tokens in expected], cache
        assert answers[0][cache]["reasons"] == ["length"] * len(expected)
        assert [answer[cache]["left"] for answer in answers] == [0] * ranks, "pages left behind"


@pytest.mark.parametrize(
    ("ranks", "segments", "more", "caches"),
    [
        (4, 4, "--helix-query-layout heads", NAMES),
        (4, 4, "--helix-query-layout segments", NAMES),
        (1, 1, "", ("batch",)),
        (2, 1, "", ("batch",)),
    ],
    ids=["query heads dealt whole", "query heads cut", "one process", "whole heads on two ranks"],
)
def test_the_same_tokens_with_other_exchanges(pool, reference, ranks, segments, more, caches):
    """Or with none, where the same engine serves the stock layer."""
    text = models.flags(
        *models.HEADS["GQA"], ranks=ranks, segments=segments, more=f"{ONE_LAYER} {more}"
    )
    long = is_full("inference") and ranks == 1
    samplings = dict.fromkeys(caches, GREEDY if long else SHORT)
    answers = pool.run(three_caches, text, ranks, samplings, world_size=ranks)
    for cache, sampling in samplings.items():
        expected = [tokens[: sampling.max_tokens] for tokens in reference("GQA", 256)]
        assert answers[0][cache]["tokens"] == expected, cache


# ------------------------------------------------------------------------------ logits

VARIANTS = {
    "plain": "",
    "partial rotary, query-key norm": "--rotary-percent 0.5 --qk-layernorm",
    "interleaved, biases": "--rotary-interleaved --add-qkv-bias",
    "learned positions, untied": "--position-embedding-type learned_absolute "
    "--untie-embeddings-and-output-weights",
    "window, output gate": "--window-size 5 --attention-output-gate",
    "experts": "--num-experts 4 --moe-ffn-hidden-size 32",
}


def plans(lengths: tuple[int, ...], tokens: list[list[int]], book: Any) -> Any:
    """Steps that compute several sequences together: a prompt in two chunks, then tokens one by one."""
    from helix_megatron.inference.step import StepPlan

    for step in range(max(map(len, tokens))):
        pieces = []
        for number, (first, row) in enumerate(zip(lengths, tokens, strict=True)):
            # Sequence `number` joins in step `number`, with its first chunk.
            at = step - number
            bounds = [0, first, first + 3, *range(first + 4, len(row) + 1)]
            if 0 <= at < len(bounds) - 1:
                part = row[bounds[at] : bounds[at + 1]]
                pieces.append(models.piece_of(book, number, bounds[at], part))
        if pieces:
            yield StepPlan(pieces=tuple(pieces))


def logits_of_steps(
    text: str, world_size: int, cache: str, dtype: torch.dtype, gathers: bool = False
) -> list[np.ndarray] | None:
    """Logits after every piece, sequence by sequence; None but on rank 0."""
    runner, _ = models.make_engine(text, world_size, cache, dtype=dtype)
    if gathers:
        for attention in runner.attentions:
            attention.gathers_up_to = 1 << 30
    lengths = (5, 1, 19)
    book = models.book_of(runner, 400)
    found: list[list[Any]] = [[] for _ in lengths]
    for plan in plans(lengths, models.prompts((30, 24, 40)), book):
        logits = runner.run(plan)
        if logits is not None:
            for piece, row in zip(plan.pieces, logits, strict=True):
                found[piece.sequence].append(row.numpy())
    return [np.stack(rows) for rows in found] if found[0] else None


def logits_without_cache(text: str, dtype: torch.dtype, world_size: int = 1) -> list[np.ndarray]:
    """The same positions from one full forward pass of each sequence."""
    _, model = models.build(text, world_size, dtype)
    for layer in model.decoder.layers:  # stock takes the gate's sigmoid in fp32
        gate = types.MethodType(HelixSelfAttention._apply_output_gate, layer.self_attention)
        layer.self_attention._apply_output_gate = gate
    found = []
    with torch.inference_mode():
        for first, row in zip((5, 1, 19), models.prompts((30, 24, 40)), strict=True):
            positions = torch.arange(len(row)).unsqueeze(0)
            logits = model(torch.tensor([row]), positions, None, runtime_gather_output=True)[0]
            ends = [first, first + 3, *range(first + 4, len(row) + 1)]
            wide = torch.promote_types(dtype, torch.float32)
            found.append(logits[np.asarray(ends) - 1, : models.VOCABULARY].to(wide).numpy())
    return found


def logits_of_all_caches(
    text: str, world_size: int, dtype: torch.dtype, gathers: bool = False
) -> dict[str, Any]:
    """`logits_of_steps` of every cache layout, in the same processes."""
    from helix_megatron import parallel_state

    found = {}
    for cache in NAMES:
        found[cache] = logits_of_steps(text, world_size, cache, dtype, gathers)
        parallel_state.destroy_model_parallel()
    return found


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """The largest difference is rounding, beside the largest logit."""
    scale = max(abs(rows).max() for rows in expected)
    for rows, wanted in zip(found, expected, strict=True):
        assert rows.dtype == np.float64
        assert abs(rows - wanted).max() <= 1e-10 * scale


def check_logits(pool, kind: str, more: str, ranks: int, work=logits_of_all_caches, **options: Any):
    """Logits of ranks with every cache layout are those of one process without a cache."""
    parallel = "--sequence-parallel" if "experts" in more else ""
    text = models.flags(
        *models.HEADS[kind], ranks=ranks, segments=SEGMENTS[kind][ranks], more=f"{more} {parallel}"
    )
    cached = pool.run(work, text, ranks, torch.float64, world_size=ranks, **options)
    alone = models.flags(*models.HEADS[kind], more=more)
    full = pool.run(logits_without_cache, alone, torch.float64, world_size=1)[0]
    assert set(cached[0]) == set(NAMES)
    for found in cached[0].values():
        assert_equal(found, full)


@pytest.mark.parametrize("name", VARIANTS)
def test_fp64_logits_equal_one_process(pool, name):
    """Chunks, decoding and sequences that join later: the same numbers as one full forward pass."""
    ranks = 4 if is_full("inference") or name in ("plain", "experts") else 2
    check_logits(pool, "GQA", VARIANTS[name], ranks)


def test_small_messages_may_be_gathered(pool):
    """What NCCL does with small messages of two ranks, here over gloo."""
    check_logits(pool, "MQA", "", 2, gathers=True)


def test_segment_local_attention_is_served(pool):
    """Another architecture: the cache holds h·m heads of d/m dimensions, and nothing is exchanged."""
    more = "--helix-attention segment-local"
    text = models.flags(4, 2, ranks=4, segments=2, more=more)
    cached = pool.run(logits_of_steps, text, 4, "segment", torch.float64, world_size=4)[0]
    assert_equal(cached, pool.run(on_ranks, text, world_size=4)[0])


def on_ranks(text: str) -> list[np.ndarray]:
    return logits_without_cache(text, torch.float64, world_size=4)


# ------------------------------------------------------------------------------ batching


@pytest.mark.parametrize(("cache", "pages"), [("batch", 12), ("sequence", 8), ("segment", 13)])
def test_preempted_sequences_get_the_same_tokens(pool, reference, cache, pages):
    """Room for one long sequence only: the others are computed anew, and nothing is lost or left."""
    text = models.flags(*models.HEADS["GQA"], ranks=4, segments=2, more=ONE_LAYER)
    arguments = models.generate, text, 4, cache, models.prompts(), SHORT
    answers = pool.run(*arguments, pages=pages, max_context=96, world_size=4)
    assert answers[0]["tokens"] == [tokens[:24] for tokens in reference("GQA", 256)]
    assert answers[0]["stats"].preemptions > 0
    assert [answer["left"] for answer in answers] == [0] * 4


def cancel_some(text: str, world_size: int, cache: str) -> dict[str, Any]:
    """Every other sequence is cancelled after its third token."""
    from helix_megatron.inference.engine import follow

    runner, engine = models.make_engine(text, world_size, cache)
    if engine is None:
        follow(runner)
        return {"left": len(runner.tables[0])}

    class Impatient(models.Collected):
        request: Request

        def __call__(self, output: Any) -> None:
            super().__call__(output)
            if len(self.tokens) == 3 and output.reason is None:
                engine.cancel(self.request)

    listeners = [(Impatient if row % 2 else models.Collected)() for row in range(5)]
    requests = [
        Request(tuple(prompt), SHORT, listener)
        for prompt, listener in zip(models.prompts(), listeners, strict=True)
    ]
    for request, listener in zip(requests, listeners, strict=True):
        listener.request = request  # type: ignore[union-attr]
    engine.submit(requests)
    engine.stop()
    engine.run()
    return {
        "tokens": [listener.tokens for listener in listeners],
        "reasons": [listener.output.reason for listener in listeners if listener.output],
        "left": engine.stats().pages_used,
    }


@pytest.mark.parametrize("cache", NAMES)
def test_cancelled_sequences_disturb_nobody(pool, reference, cache):
    """The others get their tokens, and the pages of the cancelled ones are free, on every rank."""
    text = models.flags(*models.HEADS["GQA"], ranks=4, segments=2, more=ONE_LAYER)
    answers = pool.run(cancel_some, text, 4, cache, world_size=4)
    expected = [tokens[:24] for tokens in reference("GQA", 256)]
    assert answers[0]["reasons"] == ["length", "cancelled"] * 2 + ["length"]
    for row, tokens in enumerate(answers[0]["tokens"]):
        assert tokens == expected[row][: 3 if row % 2 else 24]
    assert [answer["left"] for answer in answers] == [0] * 4


def with_bad_listener(text: str, world_size: int) -> dict[str, Any]:
    """One listener raises, one asks for what overflows; the third one's tokens."""
    runner, engine = models.make_engine(text, world_size, "batch")
    good = models.Collected()

    def bad(output: Any) -> None:
        raise ValueError("nobody listens")

    broken = models.Collected()
    prompts = models.prompts((5, 7, 9))
    engine.submit(
        [
            Request(tuple(prompt), SHORT, listener)
            for prompt, listener in zip(prompts, (bad, broken, good), strict=True)
        ]
    )
    real, steps = runner.run, []

    def overflowing(plan: Any) -> Any:
        logits = real(plan).clone()
        steps.append(plan)
        if len(steps) == 4:
            logits[1] = float("nan")
        return logits

    runner.run = overflowing
    engine.stop()
    engine.run()
    return {
        "good": good.tokens,
        "broken": (len(broken.tokens), broken.output),
        "left": engine.stats().pages_used,
        "failure": engine.failure,
    }


def test_trouble_of_one_sequence_is_its_own(pool):
    """A listener that raises and logits that are no numbers: the others go on, and no page is left."""
    text = models.flags(*models.HEADS["GQA"])
    found = pool.run(with_bad_listener, text, 1, world_size=1)[0]
    count, output = found["broken"]
    assert (count, output.reason) == (3, "error")
    assert "no numbers" in output.error
    expected = pool.run(
        models.greedy_without_cache, text, models.prompts((5, 7, 9))[2:], 24, world_size=1
    )[0]
    assert (found["good"], found["left"], found["failure"]) == (expected[0], 0, "")


def logits_as_on_a_gpu(text: str, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """With the plain kernel, pages always copied, and small messages gathered."""
    from helix_megatron.core.caches import paged

    kept = paged.VIEW_FROM, paged.COPY_UP_TO, paged.partial_kernel
    paged.VIEW_FROM, paged.COPY_UP_TO = {}, {}
    paged.partial_kernel = lambda device: unfused
    try:
        return logits_of_all_caches(text, world_size, dtype, gathers=True)
    finally:
        paged.VIEW_FROM, paged.COPY_UP_TO, paged.partial_kernel = kept


def test_the_path_of_a_gpu_on_the_cpu(pool):
    """Other kernel, other reads and other collectives give the same numbers."""
    check_logits(pool, "GQA", "", 4, logits_as_on_a_gpu)


def test_bf16_is_no_worse_than_stock_in_bf16(pool):
    """At most twice stock's error in the same precision, both against fp64."""
    heads = models.HEADS["GQA"]
    alone = models.flags(*heads)
    exact = pool.run(logits_without_cache, alone, torch.float64, world_size=1)[0]
    stock = pool.run(logits_without_cache, alone, torch.bfloat16, world_size=1)[0]
    text = models.flags(*heads, ranks=4, segments=2)
    cached = pool.run(logits_of_all_caches, text, 4, torch.bfloat16, world_size=4)[0]

    def error(found: list[np.ndarray]) -> float:
        differences = [(a - b).ravel() for a, b in zip(found, exact, strict=True)]
        return float(np.sqrt((np.concatenate(differences) ** 2).mean()))

    for cache, ours in cached.items():
        assert all(np.isfinite(rows).all() and abs(rows).max() > 0 for rows in ours), cache
        assert 0 < error(ours) <= 2 * error(stock), cache
