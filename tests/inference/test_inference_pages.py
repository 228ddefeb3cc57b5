"""Pages, plans and schedules: every position is kept exactly once, and nobody starves; also on ranks."""

from __future__ import annotations

import datetime
from typing import Any

import inference_models as models
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import sized

from helix_megatron.core.caches import (
    CACHE_LAYOUTS,
    NAMES,
    DecodeShape,
    cache_layout,
    choose_cache_layout,
    explain_cache_layout,
)
from helix_megatron.core.caches.book import PageBook
from helix_megatron.core.caches.pages import Piece
from helix_megatron.core.layout import HeadLayout
from helix_megatron.inference.request import Output, Request, Sampling
from helix_megatron.inference.scheduler import Running, Scheduler
from helix_megatron.inference.step import INLINE, StepPlan, hear, plan_group, tell

BOOKS = [(1, False), (3, False), (3, True), (4, True)]  # members, dealt


def check_book(book: PageBook, lengths: dict[int, int]) -> None:
    """Every position of every sequence at exactly one member, in a slot that no other has."""
    taken: set[tuple[int, int]] = set()
    pages = 0
    for sequence, length in lengths.items():
        positions = np.arange(length)
        owners = book.owners(sequence, positions)
        for member in range(book.members):
            own = positions[owners == member]
            assert (book.positions(sequence, member, length) == own).all()
            slots = book.slots(sequence, member, own)
            taken |= {(member, int(slot)) for slot in slots}
            held = book.pages(sequence, member)
            assert set(slots // book.page_size) == set(held), "a page without positions"
            pages += len(held)
    assert len(taken) == sum(lengths.values())
    assert book.used == pages
    assert book.used <= book.total


@pytest.mark.parametrize(("members", "dealt"), BOOKS)
@settings(max_examples=sized("inference", full=60, quick=20), deadline=None)
@given(data=st.data())
def test_a_position_has_one_slot(members, dealt, data):
    """Whatever sequences come, grow and go."""
    book = PageBook(members, pages=12, page_size=4, dealt=dealt)
    lengths: dict[int, int] = {}
    for step in range(data.draw(st.integers(1, 25))):
        order = data.draw(st.sampled_from(["add", "grow", "drop"]))
        if order == "add":
            book.add(step, data.draw(st.integers(0, members - 1)), expected=9)
            lengths[step] = 0
        elif lengths:
            sequence = data.draw(st.sampled_from(sorted(lengths)))
            if order == "drop":
                book.drop(sequence)
                del lengths[sequence]
            else:
                length = lengths[sequence] + data.draw(st.integers(0, 30))
                used = book.used
                if book.grow(sequence, length):
                    lengths[sequence] = length
                else:
                    assert book.used == used, "a refusal changes nothing"
        check_book(book, lengths)
    for sequence in lengths:
        book.drop(sequence)
    assert book.used == 0


def test_sequences_get_neighbouring_pages():
    """Sequences that grow in turns still have runs of pages, which are read without a copy."""
    book = PageBook(1, pages=64, page_size=4, dealt=False)
    for sequence in range(4):
        book.add(sequence, 0, expected=64)
    for length in range(1, 65):
        for sequence in range(4):
            assert book.grow(sequence, length)
    assert all((np.diff(book.pages(sequence, 0)) == 1).all() for sequence in range(4))


@given(
    st.lists(st.integers(0, 2**40), max_size=4),
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 2**31), min_size=1)), max_size=6),
    st.lists(st.integers(0, 2**31), max_size=3),
    st.booleans(),
)
def test_a_plan_arrives_as_it_was_sent(drops, parts, pages, last):
    """Numbers only; what stands behind them in the buffer is not read."""
    pieces = tuple(
        Piece(number, start, np.asarray(tokens, dtype=np.int64), start % 3, pages[number:], start)
        for number, (start, tokens) in enumerate(parts)
    )
    plan = StepPlan(tuple(drops), pieces, last)
    came = StepPlan.decode(np.concatenate([plan.encode(), [5, 6, 7]]))
    assert (came.drops, came.last, len(came.pieces)) == (plan.drops, last, len(pieces))
    for one, other in zip(pieces, came.pieces, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        for name in ("sequence", "start", "member", "pages", "wanted", "stop"):
            assert getattr(one, name) == getattr(other, name)


# ---------------------------------------------------------------------------- schedules


def ignore(output: Output) -> None:
    """A listener."""


def sequence(number: int, prompt: int, output: int) -> Running:
    sampling = Sampling(max_tokens=output, temperature=0)
    return Running(Request((1,) * prompt, sampling, ignore), sampling, number, [1] * prompt)


def plans_beside_the_device(plan: StepPlan) -> tuple[str, bool]:
    """(back end of the group for plans, whether a plan came as it was sent) where tensors go over NCCL.

    Its timeout is that of the group of the tensors, which a user has chosen.
    """
    from helix_megatron.core import collectives

    known, collectives.backend_of = collectives.backend_of, lambda group, device: "nccl"
    try:
        tensors = dist.new_group(timeout=datetime.timedelta(minutes=7))
        group = plan_group(tensors, torch.device("cuda"))
    finally:
        collectives.backend_of = known
    assert group is not tensors
    assert group._get_backend(torch.device("cpu")).options._timeout == datetime.timedelta(minutes=7)
    if dist.get_rank() == 0:
        tell(plan, group)
        return dist.get_backend(group), True
    same = (hear(group).encode() == plan.encode()).all()
    return dist.get_backend(group), bool(same)


@pytest.mark.parametrize("tokens", [3, INLINE + 1])
def test_plans_go_over_gloo_whatever_tensors_go_over(pool, tokens):
    """A broadcast on a GPU would have every rank wait for its device before the step begins."""
    plan = StepPlan(pieces=(Piece(4, 2, np.arange(tokens), 0, (5, 6), 1),))
    assert pool.run(plans_beside_the_device, plan, world_size=2) == [("gloo", True)] * 2


@pytest.mark.parametrize(("members", "dealt"), BOOKS)
@settings(max_examples=sized("inference", full=40, quick=20), deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12),
    chunk=st.integers(1, 16),
    most=st.integers(1, 5),
)
def test_every_sequence_is_finished(members, dealt, asked, chunk, most):
    """With little room, preemption included: each position is computed before the next, none is left."""
    book = PageBook(members, pages=12, page_size=4, dealt=dealt, shares=False)
    scheduler = Scheduler(book, max_sequences=most, prefill_chunk=chunk)
    everybody = [sequence(n, *sizes) for n, sizes in enumerate(asked)]
    for each in everybody:
        scheduler.add(each)
    kept: dict[int, int] = {}
    for _ in range(3000):
        if scheduler.idle:
            break
        plan, wanted = scheduler.plan()
        for number in plan.drops:
            kept.pop(number, None)
        assert plan.pieces
        prompts = [p for p in plan.pieces if len(p.tokens) > 1]
        assert sum(len(p.tokens) for p in prompts) <= chunk
        assert len(plan.pieces) <= most
        for piece in plan.pieces:
            assert piece.start == kept.get(piece.sequence, 0)
            kept[piece.sequence] = piece.stop
        for each in wanted:
            assert kept[each.number] == len(each.tokens)
            if scheduler.give(each, 2) is not None:
                scheduler.remove(each)
    assert scheduler.idle, "somebody starves"
    assert [each.generated for each in everybody] == [output for _, output in asked]
    assert book.used == 0


def test_the_first_come_is_never_preempted():
    """The oldest sequence makes progress in every step, so that all end some day."""
    book = PageBook(1, pages=6, page_size=4, dealt=False, shares=False)
    scheduler = Scheduler(book, max_sequences=4, prefill_chunk=8)
    oldest = sequence(0, 4, 20)
    for each in (oldest, sequence(1, 4, 20), sequence(2, 4, 20)):
        scheduler.add(each)
    for step in range(20):
        _, wanted = scheduler.plan()
        assert oldest in wanted, step
        for each in wanted:
            if scheduler.give(each, 2) is not None:
                scheduler.remove(each)
    assert oldest.generated == 20
    assert scheduler.preemptions > 0


def test_only_who_holds_what_is_missing_is_preempted():
    """In the batch layout pages of another member are of no use: nobody is computed anew for nothing."""
    book = PageBook(2, pages=4, page_size=4, dealt=False, shares=False)
    scheduler = Scheduler(book, max_sequences=4, prefill_chunk=32)
    for number in range(
        4
    ):  # members 0, 1, 0, 1; each needs 3 pages in the end, of 4 that a member has
        scheduler.add(sequence(number, 6, 6))
    members = {}
    while not scheduler.idle:
        running = {each: each.member for each in scheduler.running}
        plan, wanted = scheduler.plan()
        members |= {piece.sequence: piece.member for piece in plan.pieces}
        for number in plan.drops:
            gone = next((each for each in running if each.number == number), None)
            if gone is not None and gone in scheduler.waiting:
                assert book.pools[running[gone]].free < 4, "an empty member was short of pages"
        for each in wanted:
            if scheduler.give(each, 2) is not None:
                scheduler.remove(each)
    assert scheduler.preemptions == 2


def test_prompts_of_the_batch_layout_are_shared_out():
    """Keepers work at the same time: two prompts that come together begin at two members, chunk by chunk."""
    book = PageBook(2, pages=20, page_size=4, dealt=False, shares=False)
    scheduler = Scheduler(book, max_sequences=4, prefill_chunk=8)
    for number in range(2):
        scheduler.add(sequence(number, 16, 1))
    plan, _ = scheduler.plan()
    assert {(piece.member, len(piece.tokens)) for piece in plan.pieces} == {(0, 4), (1, 4)}
    alone = Scheduler(PageBook(2, 20, 4, dealt=False), max_sequences=4, prefill_chunk=8)
    alone.add(sequence(0, 16, 1))
    assert [len(piece.tokens) for piece in alone.plan()[0].pieces] == [8]


# ------------------------------------------------------------------------------- choice


def shape(sequences: int = 64, context: int = 8192, **changes: Any) -> DecodeShape:
    layout = HeadLayout(
        **{**dict(num_heads=8, num_kv_heads=1, head_dim=128, segments=2), **changes}
    )
    return DecodeShape(layout, sequences, context)


def test_auto_is_never_far_from_the_fastest():
    """One sequence alone must not leave m − 1 ranks idle, as batch would, nor many send their scores."""
    assert choose_cache_layout(shape()).name == "sequence"
    text = explain_cache_layout(shape())
    chosen = choose_cache_layout(shape()).name
    assert f"{chosen}: " in text
    assert text.count("<- chosen") == 1
    assert "64 sequences, ms" in text
    assert choose_cache_layout(shape(), "segment").name == "segment"
    with pytest.raises(
        ValueError, match=r"cache layout 'pages' is unknown\. Valid: auto, batch, seq"
    ):
        choose_cache_layout(shape(), "pages")


def test_only_the_segment_layout_sends_more_for_a_longer_context():
    """The costs themselves; the collectives that run are held against them in test_inference_engine."""
    for cache in CACHE_LAYOUTS:
        short, long = (cache.bytes(shape(context=context)) for context in (1024, 16384))
        assert (short == long) == (cache.name != "segment")
        assert cache.read_bytes(shape()) == shape().cache_bytes() / 2
    assert cache_layout("batch").read_bytes(shape(1)) == shape(1).cache_bytes()


# --------------------------------------------------------------------- memory and bytes


def cache_bytes(text: str, world_size: int, cache: str, pages: int, count: int) -> tuple[int, int]:
    """(bytes of this rank's pool, largest number of pages in use) after sequences of 61 positions."""
    runner, _ = models.make_engine(text, world_size, cache, pages=pages)
    book = models.book_of(runner, pages)
    runner.run(StepPlan(pieces=tuple(models.piece_of(book, n, 0, [0] * 61) for n in range(count))))
    return runner.cache.nbytes, book.used


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
    from helix_megatron.core.meter import EXCHANGE, measure

    longest = max(contexts) + 1
    pages = 4 * -(-longest // 64) + 4
    runner, _ = models.make_engine(
        text, world_size, cache, pages=pages, page_size=64, max_context=longest
    )
    found = []
    for context in contexts:
        book = models.book_of(runner, pages)
        pieces = [models.piece_of(book, n, context, [0]) for n in range(4)]
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
