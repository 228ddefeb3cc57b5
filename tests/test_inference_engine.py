"""The engine on real ranks: its tokens and logits are those of one process, and no key is kept twice."""

from __future__ import annotations

import types
from typing import Any

import inference_models as models
import numpy as np
import pytest
import torch
from tiers import is_full, sized

from helix_megatron.inference.cache_layouts import NAMES, DecodeShape, cache_layout
from helix_megatron.inference.request import Request, Sampling
from helix_megatron.kernels.partial import unfused
from helix_megatron.layout import HeadLayout
from helix_megatron.megatron.self_attention import HelixSelfAttention

GREEDY = Sampling(max_tokens=256, temperature=0)
ONE_LAYER = "--num-layers 1"
SHORT = Sampling(max_tokens=24, temperature=0)
# Of the quick tier: one cache layout for each kind of heads generates 256 tokens, on 2 ranks, and one kind runs
# on 8 ranks. The full tier has all of them everywhere.
LONG = {"MHA": "batch", "GQA": "segment", "MQA": "sequence"}
RANKS = [
    pytest.param(
        kind, ranks, marks=[pytest.mark.full("inference")] * (ranks == 8 and kind != "MQA")
    )
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


@pytest.mark.parametrize(("kind", "ranks"), RANKS)
def test_256_greedy_tokens_are_those_of_one_process(pool, reference, kind, ranks):
    """Every cache layout, prompts of mixed lengths, one token of which every step depends on all before.

    On 8 ranks the quick tier has one layout.
    """
    expected = reference(kind, 256)
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "prompts that say the same"
    segments = SEGMENTS[kind][ranks]
    text = models.flags(*models.HEADS[kind], ranks=ranks, segments=segments, more=ONE_LAYER)
    long = {LONG[kind]} if ranks == 2 else set()
    caches = NAMES if is_full("inference") or ranks < 8 else (LONG[kind],)
    samplings = {
        cache: GREEDY if is_full("inference") or cache in long else SHORT for cache in caches
    }
    answers = pool.run(three_caches, text, ranks, samplings, world_size=ranks)
    for cache, sampling in samplings.items():
        count = sampling.max_tokens
        assert answers[0][cache]["tokens"] == [tokens[:count] for tokens in expected], cache
        assert answers[0][cache]["reasons"] == ["length"] * len(expected)
        assert [answer[cache]["left"] for answer in answers] == [0] * ranks, "pages left behind"


@pytest.mark.parametrize("query_layout", ["heads", "segments"])
def test_both_query_layouts(pool, reference, query_layout):
    """Query heads dealt whole, or cut: other exchanges, the same tokens."""
    more = f"{ONE_LAYER} --helix-query-layout {query_layout}"
    text = models.flags(*models.HEADS["GQA"], ranks=4, segments=4, more=more)
    answers = pool.run(three_caches, text, 4, dict.fromkeys(NAMES, SHORT), world_size=4)
    expected = [tokens[:24] for tokens in reference("GQA", 256)]
    assert all(answers[0][cache]["tokens"] == expected for cache in NAMES)


def test_one_process(pool, reference):
    """Without segments the same engine serves the stock layer."""
    text = models.flags(*models.HEADS["GQA"], more=ONE_LAYER)
    sampling = sized("inference", full=GREEDY, quick=SHORT)
    answer = pool.run(models.generate, text, 1, "batch", models.prompts(), sampling, world_size=1)
    expected = [tokens[: sampling.max_tokens] for tokens in reference("GQA", 256)]
    assert answer[0]["tokens"] == expected


def test_whole_heads_on_several_ranks(pool, reference):
    """m = 1, TP 2: nothing to exchange in attention."""
    text = models.flags(*models.HEADS["GQA"], ranks=2, more=ONE_LAYER)
    answer = pool.run(models.generate, text, 2, "batch", models.prompts(), SHORT, world_size=2)[0]
    assert answer["tokens"] == [tokens[:24] for tokens in reference("GQA", 256)]


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


def plans(lengths: tuple[int, ...], tokens: list[list[int]], members: int) -> Any:
    """Steps that compute several sequences together: a prompt in two chunks, then tokens one by one."""
    from helix_megatron.inference.step import Piece, StepPlan

    for step in range(max(map(len, tokens))):
        pieces = []
        for number, (first, row) in enumerate(zip(lengths, tokens, strict=True)):
            # Sequence `number` joins in step `number`, with its first chunk.
            at = step - number
            bounds = [0, first, first + 3, *range(first + 4, len(row) + 1)]
            if 0 <= at < len(bounds) - 1:
                part = np.asarray(row[bounds[at] : bounds[at + 1]], dtype=np.int64)
                pieces.append(Piece(number, bounds[at], part, number % members, len(row), True))
        if pieces:
            yield StepPlan(pieces=tuple(pieces))


def logits_of_steps(
    text: str, world_size: int, cache: str, dtype: torch.dtype, gathers: bool = False
) -> list[np.ndarray] | None:
    """Logits after every piece, sequence by sequence; None but on rank 0."""
    runner, _ = models.make_engine(text, world_size, cache, dtype=dtype)
    if gathers:
        runner.attention.gathers_up_to = 1 << 30
    lengths = (5, 1, 19)
    found: list[list[Any]] = [[] for _ in lengths]
    for plan in plans(lengths, models.prompts((30, 24, 40)), runner.book.members):
        logits = runner.run(plan)
        if logits is not None:
            for piece, row in zip(plan.pieces, logits, strict=True):
                found[piece.sequence].append(row.numpy())
    return [np.stack(rows) for rows in found] if found[0] else None


def logits_without_cache(text: str, dtype: torch.dtype) -> list[np.ndarray]:
    """The same positions from one full forward pass of each sequence, in one process."""
    _, model = models.build(text, 1, dtype)
    for layer in model.decoder.layers:  # stock takes the gate's sigmoid in fp32
        gate = types.MethodType(HelixSelfAttention._apply_output_gate, layer.self_attention)
        layer.self_attention._apply_output_gate = gate
    found = []
    with torch.inference_mode():
        for first, row in zip((5, 1, 19), models.prompts((30, 24, 40)), strict=True):
            tokens = torch.tensor([row])
            logits = model(tokens, torch.arange(len(row)).unsqueeze(0), None)[0]
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


def relative_errors(pool, kind: str, more: str, ranks: int, **options: Any) -> dict[str, float]:
    """Largest difference of logits between ranks with a cache and one process without, of their largest."""
    segments = SEGMENTS[kind][ranks]
    parallel = "--sequence-parallel" if "experts" in more else ""
    text = models.flags(
        *models.HEADS[kind], ranks=ranks, segments=segments, more=f"{more} {parallel}"
    )
    cached = pool.run(logits_of_all_caches, text, ranks, torch.float64, world_size=ranks, **options)
    alone = models.flags(*models.HEADS[kind], more=more)
    full = pool.run(logits_without_cache, alone, torch.float64, world_size=1)[0]
    scale = max(abs(rows).max() for rows in full)
    errors = {}
    for cache, found in cached[0].items():
        assert all(rows.dtype == np.float64 for rows in found)
        differences = [abs(a - b).max() for a, b in zip(found, full, strict=True)]
        errors[cache] = float(max(differences) / scale)
    return errors


@pytest.mark.parametrize("name", VARIANTS)
def test_fp64_logits_equal_one_process(pool, name):
    """Chunks, decoding and sequences that join later: the same numbers as one full forward pass."""
    ranks = 4 if is_full("inference") or name in ("plain", "experts") else 2
    errors = relative_errors(pool, "GQA", VARIANTS[name], ranks)
    assert max(errors.values()) <= 1e-10, errors


def test_small_messages_may_be_gathered(pool):
    """What NCCL does with small messages of two ranks, here over gloo."""
    errors = relative_errors(pool, "MQA", "", 2, gathers=True)
    assert max(errors.values()) <= 1e-10, errors


def test_segment_local_attention_is_served(pool):
    """Another architecture: the cache holds h·m heads of d/m dimensions, and nothing is exchanged."""
    more = "--helix-attention segment-local"
    text = models.flags(4, 2, ranks=4, segments=2, more=more)
    cached = pool.run(logits_of_steps, text, 4, "segment", torch.float64, world_size=4)[0]
    full = pool.run(logits_on_ranks, text, world_size=4)[0]
    difference = max(abs(a - b).max() for a, b in zip(cached, full, strict=True))
    assert difference <= 1e-10 * max(abs(rows).max() for rows in full)


def logits_on_ranks(text: str) -> list[np.ndarray]:
    """As `logits_without_cache`, on the ranks of the layout itself."""
    _, model = models.build(text, 4, torch.float64)
    found = []
    with torch.inference_mode():
        for first, row in zip((5, 1, 19), models.prompts((30, 24, 40)), strict=True):
            positions = torch.arange(len(row)).unsqueeze(0)
            logits = model(torch.tensor([row]), positions, None, runtime_gather_output=True)[0]
            ends = [first, first + 3, *range(first + 4, len(row) + 1)]
            found.append(logits[np.asarray(ends) - 1, : models.VOCABULARY].numpy())
    return found


# --------------------------------------------------------------------- memory and bytes


def cache_bytes(text: str, world_size: int, cache: str, pages: int, count: int) -> tuple[int, int]:
    """(bytes of this rank's pool, largest number of pages in use) after sequences of 61 positions."""
    from helix_megatron.inference.step import Piece, StepPlan

    runner, _ = models.make_engine(text, world_size, cache, pages=pages)
    tokens = np.zeros(61, dtype=np.int64)
    pieces = [Piece(n, 0, tokens, n % runner.book.members, 61, True) for n in range(count)]
    runner.run(StepPlan(pieces=tuple(pieces)))
    return runner.cache.k.nbytes + runner.cache.v.nbytes, runner.book.used


def stock_cache_bytes(text: str, world_size: int, count: int) -> int:
    """Bytes of megatron-core's static context on this rank, for the same sequences."""
    from megatron.core.inference.contexts import StaticInferenceContext

    _, model = models.build(text, world_size)
    context = StaticInferenceContext(max_batch_size=count, max_sequence_length=61)
    with torch.inference_mode():
        tokens = torch.zeros(count, 61, dtype=torch.long)
        positions = torch.arange(61).expand(count, -1)
        model(tokens, positions, None, inference_context=context, runtime_gather_output=True)
    return sum(k.nbytes + v.nbytes for k, v in context.key_value_memory_dict.values())


@pytest.mark.parametrize(("kind", "segments"), [("MQA", 4), ("GQA", 2)])
def test_keys_and_values_are_kept_once(pool, kind, segments):
    """Pools that hold one copy and at most a page more on each rank are enough; stock keeps p/g copies."""
    heads, groups = models.HEADS[kind]
    count = segments
    copy = (
        2 * 2 * count * 61 * groups * 16 * 4
    )  # keys and values, layers, sequences, positions, heads, d, fp32
    text = models.flags(heads, groups, ranks=4, segments=segments)
    blocks = -(-61 // models.PAGE)
    for cache in NAMES:
        whole = cache != "segment"
        pages = count * blocks // (segments if whole else 1)
        found = pool.run(cache_bytes, text, 4, cache, pages, count, world_size=4)
        total = sum(size for size, _ in found)
        page = 2 * 2 * models.PAGE * groups // (4 // segments) * 16 * 4
        assert found[0][1] == pages * (segments if whole else 1), "every page is in use"
        assert copy <= total <= copy + 4 * page, cache
    if groups < 4:  # megatron-core gives a rank a whole head of its own
        stock = pool.run(
            stock_cache_bytes, models.flags(heads, groups, ranks=4), 4, count, world_size=4
        )
        assert sum(stock) == copy * 4 // groups


def bytes_of_a_token(text: str, world_size: int, cache: str, contexts: list[int]) -> list[int]:
    """Bytes that this rank sends in attention for one token of each of 4 sequences, by context."""
    from helix_megatron.inference.step import Piece, StepPlan
    from helix_megatron.meter import EXCHANGE, measure

    longest = max(contexts) + 1
    pages = 4 * -(-longest // 64) + 4
    runner, _ = models.make_engine(
        text, world_size, cache, pages=pages, page_size=64, max_context=longest
    )
    found = []
    for context in contexts:
        token = np.zeros(1, dtype=np.int64)
        members = runner.book.members
        pieces = [Piece(n, context, token, n % members, longest, True) for n in range(4)]
        with measure() as meter:
            runner.run(StepPlan(pieces=tuple(pieces)))
        found.append(meter.bytes(EXCHANGE))
        runner.run(StepPlan(drops=(0, 1, 2, 3)))
    return found


@pytest.mark.parametrize("query_layout", ["heads", "segments"])
@pytest.mark.parametrize("cache", NAMES)
def test_bytes_of_a_token(pool, cache, query_layout):
    """Independent of the context for batch and sequence, and what the cost model says for all three."""
    contexts = sized("inference", full=[1023, 4095, 16383], quick=[255, 1023])
    more = f"--helix-query-layout {query_layout}"
    text = models.flags(4, 1, ranks=4, segments=4, more=more)
    found = pool.run(bytes_of_a_token, text, 4, cache, contexts, world_size=4)
    sent = [sum(rank[i] for rank in found) for i in range(len(contexts))]
    layout = HeadLayout(4, 1, 16, 1, 4, query_layout)
    shapes = [DecodeShape(layout, 4, context + 1, 4) for context in contexts]
    assert sent == [2 * 4 * cache_layout(cache).bytes(shape) for shape in shapes]  # layers, ranks
    assert (len(set(sent)) == 1) == (cache != "segment")
    assert sent[0] > 0


# ------------------------------------------------------------------------------ batching


def with_little_room(text: str, world_size: int, cache: str, pages: int) -> dict[str, Any]:
    return models.generate(
        text, world_size, cache, models.prompts(), SHORT, pages=pages, max_context=96
    )


@pytest.mark.parametrize(("cache", "pages"), [("batch", 12), ("sequence", 8), ("segment", 13)])
def test_preempted_sequences_get_the_same_tokens(pool, reference, cache, pages):
    """Room for one long sequence only: the others are computed anew, and nothing is lost or left."""
    text = models.flags(*models.HEADS["GQA"], ranks=4, segments=2, more=ONE_LAYER)
    answers = pool.run(with_little_room, text, 4, cache, pages, world_size=4)
    assert answers[0]["tokens"] == [tokens[:24] for tokens in reference("GQA", 256)]
    assert answers[0]["stats"].preemptions > 0
    assert [answer["left"] for answer in answers] == [0] * 4


def cancel_some(text: str, world_size: int, cache: str) -> dict[str, Any]:
    """Every other sequence is cancelled after its third token."""
    from helix_megatron.inference.engine import follow

    runner, engine = models.make_engine(text, world_size, cache)
    if engine is None:
        follow(runner)
        return {"left": runner.book.used}

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


def logits_as_on_a_gpu(text: str, world_size: int) -> dict[str, Any]:
    """With the plain kernel, pages always copied, and small messages gathered."""
    from helix_megatron.inference import paged

    kept = paged.VIEW_FROM, paged.COPY_UP_TO, paged.partial_kernel
    paged.VIEW_FROM, paged.COPY_UP_TO = {}, {}
    paged.partial_kernel = lambda device: unfused
    try:
        return logits_of_all_caches(text, world_size, torch.float64, gathers=True)
    finally:
        paged.VIEW_FROM, paged.COPY_UP_TO, paged.partial_kernel = kept


def test_the_path_of_a_gpu_on_the_cpu(pool):
    """Other kernel, other reads and other collectives give the same numbers."""
    text = models.flags(*models.HEADS["GQA"], ranks=4, segments=2)
    cached = pool.run(logits_as_on_a_gpu, text, 4, world_size=4)[0]
    alone = models.flags(*models.HEADS["GQA"])
    full = pool.run(logits_without_cache, alone, torch.float64, world_size=1)[0]
    scale = max(abs(rows).max() for rows in full)
    for cache, found in cached.items():
        differences = [abs(a - b).max() for a, b in zip(found, full, strict=True)]
        assert max(differences) <= 1e-10 * scale, cache


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
