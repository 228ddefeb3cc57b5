"""Pages of layers with windows: what a query sees is there, what none will see is free."""

from __future__ import annotations

import random

import numpy as np
import pytest

from helix_megatron.core.caches.book import FREED, PageBook
from helix_megatron.core.caches.pages import PageTables
from helix_megatron.core.caches.windows import BookPair, Reach, WindowBook
from helix_megatron.inference.request import Request, Sampling
from helix_megatron.inference.scheduler import Running, Scheduler

PAGE, BACK, CHUNK = 4, 9, 12


def seen_is_there(book: PageTables, sequence: int, start: int, stop: int) -> set[tuple[int, int]]:
    """(member, slot) of every position that a query of [start, stop) sees: each has one of its own."""
    positions = np.arange(max(0, start - BACK), stop)
    slots = []
    for member in range(book.members):
        own = positions[book.owners(sequence, positions) == member]
        places = book.slots(sequence, member, own)
        assert (places >= 0).all(), "a page that is still seen was freed"
        slots += [(member, place) for place in places.tolist()]
    assert len(set(slots)) == len(positions)
    return set(slots)


@pytest.mark.parametrize(("members", "dealt"), [(1, False), (3, False), (3, True)])
def test_a_sequence_holds_no_more_than_its_window(members, dealt):
    """Token by token, 200 of them: never more pages than the reach needs, all of them free in the end."""
    reach = Reach(BACK, 1)
    book = WindowBook(members, 20, PAGE, dealt=dealt, reach=reach)
    book.add(7, members - 1, 200)
    for position in range(200):
        assert book.grow(7, position + 1)
        seen_is_there(book, 7, position, position + 1)
        assert book.used == position // PAGE + 1 - max(0, position - BACK) // PAGE
        assert book.used <= reach.blocks(PAGE)
    assert any(FREED in book.pages(7, member) for member in range(members))
    book.drop(7)
    assert book.used == 0


@pytest.mark.parametrize(("members", "dealt"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("seed", range(5))
def test_random_requests_all_end(seed, members, dealt):
    """With preemptions or without, every request gets its tokens, and no step lacks a page that it sees."""
    draw = random.Random(seed)

    windowed = WindowBook(members, 12, PAGE, dealt=dealt, reach=Reach(BACK, CHUNK))
    book = BookPair(PageBook(members, 24, PAGE, dealt=dealt, shares=False), windowed)
    scheduler, tables = Scheduler(book, 6, CHUNK), PageTables(members, PAGE, dealt=dealt)
    sequences = [
        Running(Request((), Sampling(max_tokens=draw.randint(1, 30)), lambda _: None), None, n, [])
        for n in range(12)
    ]
    for one in sequences:
        one.sampling = one.request.sampling
        one.tokens = [1] * draw.randint(1, 50)
        one.request.prompt = tuple(one.tokens)
        scheduler.add(one)
    for _ in range(5000):
        if scheduler.idle:
            break
        plan, wanted = scheduler.plan()
        for number in plan.drops:
            if number in tables:
                tables.drop(number)
        seen: set[tuple[int, int]] = set()
        for piece in plan.pieces:
            if piece.sequence not in tables:
                tables.add(piece.sequence, piece.member)
            new = len(piece.pages) // 2
            tables.extend(piece.sequence, piece.pages[new:])
            slots = seen_is_there(tables, piece.sequence, piece.start, piece.stop)
            assert not seen & slots, "two sequences see one page"
            seen |= slots
            assert slots == seen_is_there(windowed, piece.sequence, piece.start, piece.stop)
        for one in wanted:
            if scheduler.give(one, 1):
                scheduler.remove(one)
    assert scheduler.idle, "a request waits for ever"
    assert all(one.generated == one.sampling.max_tokens for one in sequences)
    assert scheduler.book.used == 0
