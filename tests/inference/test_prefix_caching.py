"""Prompts that begin alike share pages: nobody reads what is not its own, and the tokens stay the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import inference_models as models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import sized

from helix_megatron.core.caches import NAMES
from helix_megatron.core.caches.book import PageBook
from helix_megatron.core.caches.pages import PageTables
from helix_megatron.inference.request import Output, Request, Sampling
from helix_megatron.inference.scheduler import Running, Scheduler
from helix_megatron.inference.step import StepPlan

PAGE = 4
BOOKS = [(1, False), (3, False), (3, True), (2, True)]  # members, dealt
Slot = tuple[int, int]


def ignore(output: Output) -> None:
    """A listener."""


def running(number: int, prompt: list[int], output: int) -> Running:
    sampling = Sampling(max_tokens=output, temperature=0)
    return Running(Request(tuple(prompt), sampling, ignore), sampling, number, list(prompt))


class Memory:
    """The pools of all members, simulated: each slot holds all tokens that its key and value depend on."""

    def __init__(self, book: PageBook) -> None:
        self.tables = PageTables(book.members, book.page_size, dealt=book.dealt)
        self.slots: dict[Slot, tuple[int, ...]] = {}

    def step(self, plan: StepPlan, tokens: dict[int, list[int]]) -> None:
        """Write what the step computes, then read what its queries see."""
        for sequence in plan.drops:
            if sequence in self.tables:
                self.tables.drop(sequence)
        for piece in plan.pieces:
            if piece.sequence not in self.tables:
                self.tables.add(piece.sequence, piece.member)
            self.tables.extend(piece.sequence, piece.pages)
        for piece in plan.pieces:
            own = tokens[piece.sequence]
            assert piece.tokens.tolist() == own[piece.start : piece.stop]
            for position, slot in self.places(piece.sequence, piece.start, piece.stop):
                self.slots[slot] = tuple(own[: position + 1])
        for piece in plan.pieces:
            own = tokens[piece.sequence]
            for position, slot in self.places(piece.sequence, 0, piece.stop):
                assert self.slots.get(slot) == tuple(own[: position + 1]), (
                    piece.sequence,
                    position,
                )

    def places(self, sequence: int, start: int, stop: int) -> Iterator[tuple[int, Slot]]:
        """The slot of each position."""
        positions = np.arange(start, stop)
        owners = self.tables.owners(sequence, positions)
        for member in range(self.tables.members):
            own = positions[owners == member]
            slots = self.tables.slots(sequence, member, own)
            yield from zip(own.tolist(), ((member, slot) for slot in slots.tolist()), strict=True)


def check_pools(book: PageBook, sequences: set[int]) -> None:
    """Each page is free, or in use as often as sequences have it, or kept without a user."""
    for member, pool in enumerate(book.pools):
        users = Counter(page for one in sequences for page in book.pages(one, member))
        assert [pool.users(page) for page in range(pool.total)] == [
            users[page] for page in range(pool.total)
        ]
        assert pool.free + pool.idle + len(users) == pool.total
        assert pool.available >= 0
    assert book.used + book.kept + sum(pool.free for pool in book.pools) == book.total
    assert len(book.prefixes) >= book.kept


@pytest.mark.parametrize(("members", "dealt"), BOOKS)
@settings(max_examples=sized("inference", full=150, quick=15), deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(["", "aaaa", "aaaabbbb", "aaaabbbbcccccccc", "ccccaaaabbbb"]),
            st.text("ab", min_size=1, max_size=9),
            st.integers(1, 9),
        ),
        min_size=2,
        max_size=12,
    ),
    chunk=st.integers(1, 16),
    most=st.integers(1, 5),
    data=st.data(),
)
def test_nobody_reads_what_is_not_its_own(members, dealt, asked, chunk, most, data):
    """Little room, preemption, sequences that go away: what a query sees are the keys of its own tokens."""
    book = PageBook(members, pages=9 if members > 1 else 12, page_size=PAGE, dealt=dealt)
    scheduler = Scheduler(book, max_sequences=most, prefill_chunk=chunk)
    memory = Memory(book)
    everybody = [
        running(number, [ord(c) for c in begin + end], output)
        for number, (begin, end, output) in enumerate(asked)
    ]
    tokens = {each.number: each.tokens for each in everybody}
    for each in everybody:
        scheduler.add(each)
    gone = set()
    for _ in range(2000):
        if scheduler.idle:
            break
        if data.draw(st.integers(0, 9)) == 0:
            unwanted = data.draw(st.sampled_from([*scheduler.running, *scheduler.waiting]))
            scheduler.remove(unwanted)
            gone.add(unwanted)
        oldest = scheduler.running[:1]
        plan, wanted = scheduler.plan()
        assert oldest == scheduler.running[:1] or not oldest, "the oldest is never preempted"
        memory.step(StepPlan.decode(plan.encode()), tokens)
        check_pools(book, {each.number for each in scheduler.running})
        for each in wanted:
            if scheduler.give(each, ord("ab"[len(each.tokens) % 2])) is not None:
                scheduler.remove(each)
    assert scheduler.idle, "somebody starves"
    assert all(each.generated == each.sampling.max_tokens for each in set(everybody) - gone)
    assert book.used == 0
    found = scheduler.prefix_tokens
    assert 0 <= found.found <= found.asked


def finish(scheduler: Scheduler) -> list[StepPlan]:
    """Run until nothing is left; every token is 7."""
    plans = []
    while not scheduler.idle:
        plan, wanted = scheduler.plan()
        plans.append(plan)
        for each in wanted:
            if scheduler.give(each, 7) is not None:
                scheduler.remove(each)
    return plans


@pytest.mark.parametrize(("members", "dealt"), BOOKS)
def test_only_the_rest_of_a_known_prompt_is_computed(members, dealt):
    """Also what was generated before; the last token is always computed, since its logits are wanted."""
    book = PageBook(members, pages=40, page_size=PAGE, dealt=dealt)
    scheduler = Scheduler(book, max_sequences=8, prefill_chunk=100)
    conversation = list(range(20, 40))
    scheduler.add(running(0, conversation, 9))
    finish(scheduler)
    starts = []
    for number, prompt in enumerate(
        [conversation, [*conversation, *[7] * 9, 1], [*conversation[:10], 1, 2], [1, *conversation]]
    ):
        scheduler.add(running(1 + number, prompt, 1))
        starts.append(finish(scheduler)[0].pieces[0].start)
    # 20 tokens are 5 pages, of which the last one holds the last token; 28 of 29 were computed before.
    assert starts == [16, 28, 8, 0]
    assert scheduler.prefix_tokens.found == sum(starts)
    assert scheduler.prefix_tokens.asked == 20 + 20 + 30 + 12 + 21


def test_a_conversation_goes_on_where_it_was_kept():
    """In the batch layout the member with the beginning takes what follows; work stays shared out."""
    book = PageBook(4, pages=10, page_size=PAGE, dealt=False)
    scheduler = Scheduler(book, max_sequences=16, prefill_chunk=100)
    for number in range(3):
        scheduler.add(running(number, [number] * 9, 1))
        finish(scheduler)
    scheduler.add(running(3, [1] * 10, 1))
    alone = finish(scheduler)[0].pieces[0]
    for number in range(4, 12):
        scheduler.add(running(number, [1] * 10, 20))
    together = scheduler.plan()[0].pieces
    assert (alone.start, alone.member) == (8, 1)
    assert together[0].member == 1
    counts = Counter(piece.member for piece in together)
    assert len(counts) == 4 and max(counts.values()) - min(counts.values()) <= 2


def test_the_least_recently_used_beginning_is_given_away_first():
    """And of a beginning its end: what is left can still be found."""
    book = PageBook(1, pages=6, page_size=PAGE, dealt=False)
    scheduler = Scheduler(book, max_sequences=1, prefill_chunk=100)
    one, two, three = ([token] * 9 for token in (1, 2, 3))  # two kept pages each, three in use

    def start(number: int, prompt: list[int]) -> int:
        scheduler.add(running(number, prompt, 1))
        return finish(scheduler)[0].pieces[0].start

    assert [start(0, one), start(1, two), start(2, one)] == [0, 0, 8]
    assert start(3, three) == 0  # takes the free pages, and the end of `two`
    assert (book.used, book.kept) == (0, 5)
    assert start(4, one) == 8
    assert start(5, two) == 4
    off = Scheduler(PageBook(1, 6, PAGE, dealt=False, shares=False), 1, 100)
    for number in range(2):
        off.add(running(number, one, 1))
        assert finish(off)[0].pieces[0].start == 0


# ------------------------------------------------------------------------------ on ranks

BEGINNING = models.prompts((44,))[0]
TAILS = models.prompts((1, 3, 9, 17, 2, 5))
GREEDY = Sampling(max_tokens=12, temperature=0)


def with_and_without(
    text: str, world_size: int, caches: tuple[str, ...], sharing: tuple[bool, ...], **options: Any
) -> Any:
    """Tokens and statistics of prompts with a common beginning, by layout and whether pages are shared."""
    from helix_megatron import parallel_state

    asked = [[*BEGINNING, *tail] for tail in TAILS] + [BEGINNING]
    found = {}
    for cache in caches:
        for shares in sharing:
            found[cache, shares] = models.generate(
                text, world_size, cache, asked, GREEDY, shares=shares, **options
            )
            parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def expected(pool: Any) -> list[list[int]]:
    """The tokens of one process that has no cache."""
    text = models.flags(*models.HEADS["GQA"], more="--num-layers 1")
    asked = [[*BEGINNING, *tail] for tail in TAILS] + [BEGINNING]
    return pool.run(models.greedy_without_cache, text, asked, GREEDY.max_tokens, world_size=1)[0]


@pytest.mark.parametrize("pages", [400, 12])
def test_the_same_tokens_from_shared_pages(pool, expected, pages):
    """Every layout, with much and with little room: the tokens of one process that has no cache."""
    text = models.flags(*models.HEADS["GQA"], ranks=4, segments=2, more="--num-layers 1")
    sharing = sized("inference", full=(True, False), quick=(True,))
    room: dict[str, Any] = {"pages": pages, "max_context": 96, "world_size": 4}
    answers = pool.run(with_and_without, text, 4, NAMES, sharing, **room)
    assert len(answers[0]) == len(NAMES) * len(sharing)
    prompts = sum(len(BEGINNING) + len(tail) for tail in TAILS) + len(BEGINNING)
    for (cache, shares), answer in answers[0].items():
        assert answer["tokens"] == expected, (cache, shares)
        stats = answer["stats"]
        assert stats.prefix_asked_tokens == prompts
        assert (stats.prefix_found_tokens > 0) == shares, cache
        assert (stats.pages_kept > 0) == shares, cache
        computed = stats.prompt_tokens + stats.prefix_found_tokens
        assert computed == prompts if pages == 400 else computed >= prompts
    assert all(one["left"] == 0 for answer in answers for one in answer.values())
