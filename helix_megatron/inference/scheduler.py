"""Which tokens the next step computes: continuous batching with chunked prefill over a paged cache.

Sequences that decode get one token each in every step; beside them prompts are computed in chunks, oldest
first, from where others have computed the same. When pages run out, the sequence that came last is preempted:
its pages go, and it is computed anew, tokens that it has been given included, when there is room. Pure
bookkeeping: no torch, no ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile

import numpy as np

from helix_megatron.core.caches.book import PageBook
from helix_megatron.core.caches.windows import BookPair
from helix_megatron.inference.request import FinishReason, Request, Sampling, TokenLogprobs
from helix_megatron.inference.step import Piece, StepPlan


@dataclass(eq=False)
class Running:
    """A sequence under way. `tokens` are prompt and output; keys and values of `computed` of them are kept.

    `shared` of them, at the beginning, were found when it was first computed.
    """

    request: Request
    sampling: Sampling
    number: int
    tokens: list[int]
    computed: int = 0
    member: int = 0
    shared: int = 0
    begun: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def decodes(self) -> bool:
        """Whether only the newest token is to be computed."""
        return self.computed == len(self.tokens) - 1 and self.generated > 0

    @property
    def reads_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be given: then all of it is computed."""
        return self.sampling.prompt_logprobs is not None and not self.generated

    @property
    def longest(self) -> int:
        """Positions that it may come to need; the last token is never computed."""
        return len(self.request.prompt) + self.sampling.max_tokens - 1


@dataclass
class PrefixTokens:
    """Tokens of prompts that were looked for among those that others have computed, and how many were found."""

    asked: int = 0
    found: int = 0


class Scheduler:
    """The sequences of an engine and their pages.

    Args:
        book: the pages, none of which is in use; nobody else changes it.
        max_sequences: how many sequences are under way at the same time.
        prefill_chunk: the most tokens of prompts in one step, over all sequences.
    """

    def __init__(self, book: PageBook | BookPair, max_sequences: int, prefill_chunk: int) -> None:
        self.book, self.max_sequences, self.prefill_chunk = book, max_sequences, prefill_chunk
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.preemptions = 0
        self.prefix_tokens = PrefixTokens()
        self._drops: list[int] = []

    def add(self, sequence: Running) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Running) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def plan(self) -> tuple[StepPlan, list[Running]]:
        """The next step, and the sequences whose next token it gives, in the order of their pieces."""
        pieces: list[tuple[Running, int]] = []
        for sequence in list(self.running):
            if sequence in self.running and sequence.decodes and self._grow(sequence, 1):
                pieces.append((sequence, 1))
        pieces = [piece for piece in pieces if piece[0] in self.running]
        self._admit()
        decoding = {sequence for sequence, _ in pieces}
        for sequence, count in self._chunks([s for s in self.running if s not in decoding]):
            if sequence in self.running and self._grow(sequence, count):
                pieces.append((sequence, count))
        pieces = [piece for piece in pieces if piece[0] in self.running]
        assert pieces or not self.running, "a step computes something for somebody"
        made = [self._piece(sequence, count) for sequence, count in pieces]
        wanted = [sequence for sequence, _ in pieces if sequence.computed == len(sequence.tokens)]
        plan = StepPlan(tuple(self._drops), tuple(made))
        self._drops.clear()
        return plan, wanted

    def last_plan(self) -> StepPlan:
        """What ends the engine on all ranks."""
        assert self.idle
        return StepPlan(tuple(self._drops), last=True)

    def give(self, sequence: Running, token: int) -> FinishReason | None:
        """Append a token to a sequence; why it ends with it, if it does."""
        sequence.tokens.append(token)
        if token in sequence.sampling.stop_tokens:
            return "stop"
        return "length" if sequence.generated >= sequence.sampling.max_tokens else None

    # -------------------------------------------------------------------- parts

    def _piece(self, sequence: Running, count: int) -> Piece:
        start = sequence.computed
        if not sequence.begun:
            sequence.begun, sequence.shared = True, start
            self.prefix_tokens.asked += len(sequence.request.prompt)
            self.prefix_tokens.found += start
        sequence.computed += count
        self.book.keep(sequence.number, sequence.tokens, sequence.computed)
        return Piece(
            sequence=sequence.number,
            start=start,
            tokens=np.asarray(sequence.tokens[start : start + count], dtype=np.int64),
            member=sequence.member,
            pages=self.book.tell(sequence.number),
            wanted=count
            if sequence.reads_prompt
            else int(sequence.computed == len(sequence.tokens)),
        )

    def _admit(self) -> None:
        """Let sequences in, first come, first served, while all their tokens so far have pages."""
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            shares = not sequence.reads_prompt
            member = self.book.place(sequence.tokens, self._promised(), shares=shares)
            if member is None:
                return
            self.waiting.popleft()
            sequence.member = member
            self.book.add(sequence.number, member, sequence.longest)
            self._share(sequence)
            self.running.append(sequence)

    def _promised(self) -> list[int]:
        """Pages of each member that prompts under way have not taken yet."""
        unfinished = [s for s in self.running if s.computed < len(s.tokens)]
        return self.book.missing([(s.number, len(s.tokens)) for s in unfinished])

    def _chunks(self, prefilling: Sequence[Running]) -> Iterator[tuple[Running, int]]:
        """Chunks of sequences that do not decode, oldest first. Where one member attends for a whole sequence
        (`batch`), members get equal shares first, so that they work at the same time."""
        for sequence in prefilling:  # others may have computed more since it was let in
            self._share(sequence)
        left = self.prefill_chunk
        counts = dict.fromkeys(prefilling, 0)
        shares = [-(-left // self.book.members)] * self.book.members
        for shared in (True, False):
            for sequence in prefilling:
                rest = len(sequence.tokens) - sequence.computed - counts[sequence]
                count = min(rest, left)
                if shared and not self.book.dealt:
                    count = min(count, shares[sequence.member])
                    shares[sequence.member] -= count
                counts[sequence] += count
                left -= count
        return ((sequence, count) for sequence, count in counts.items() if count)

    def _share(self, sequence: Running) -> None:
        if not sequence.reads_prompt:
            sequence.computed = self.book.share(sequence.number, sequence.tokens)

    def _grow(self, sequence: Running, count: int) -> bool:
        """Pages for more positions, if need be of those that came later; False if it was preempted itself."""
        length = sequence.computed + count
        while not self.book.grow(sequence.number, length):
            short = self.book.short(sequence.number, length)
            younger = list(takewhile(lambda s: s is not sequence, reversed(self.running)))
            # Pages that only younger ones share are free when all of these are gone.
            alone = (s for s in younger if self.book.would_free(s.number, short))
            holding = (s for s in younger if self.book.holds(s.number, short))
            last = next(chain(alone, holding), sequence)
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Running) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Running) -> None:
        self.book.drop(sequence.number)
        self._drops.append(sequence.number)
