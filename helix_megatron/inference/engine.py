"""The loop: rank 0 schedules, tells the others, computes with them and gives tokens to whoever asked.

engine = Engine(runner, ...)          # on rank 0
engine.submit([Request(prompt, Sampling(max_tokens=32), listener)])
engine.run()                          # until stop() and all is done

follow(runner)                        # on every other rank
"""

from __future__ import annotations

import dataclasses
import logging
import math
import secrets
import threading
import time
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from helix_megatron.errors import HelixError
from helix_megatron.inference.request import (
    MAX_SEED,
    Capacity,
    Output,
    QueueFullError,
    Request,
    Stats,
    StoppingError,
)
from helix_megatron.inference.runner import Runner
from helix_megatron.inference.sampler import Chosen, Place, logprobs_of, sample
from helix_megatron.inference.scheduler import Running, Scheduler
from helix_megatron.inference.step import StepPlan, hear, tell

LOGGER = logging.getLogger(__name__)
# An idle engine steps so often, so that a dead rank is noticed and no wait times out.
HEARTBEAT_SECONDS = 1.0
NOT_FINITE = (
    "the model gave logits that are no numbers. Half precision may overflow: try --dtype bf16."
)


class Engine:
    """Continuous batching on rank 0. Implements `helix_megatron.inference.request.Engine`.

    Args:
        runner: what computes this rank's share of a step.
        scheduler: what chooses the steps; its own books use as many pages as the runner's.
        capacity: what requests are held to.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, capacity: Capacity) -> None:
        self.capacity = capacity
        self._runner, self._scheduler = runner, scheduler
        self._lock = threading.Condition()
        self._sequences: dict[int, Running] = {}  # by number of the request
        self._arrived: list[Running] = []
        self._cancelled: list[Request] = []
        self._stopping = False
        self._deadline = math.inf
        self._failure = ""
        self._counters = Stats()  # those that only steps change
        # A page of the books stands for one in every head group; or, where all members keep segments of every
        # position, for one on every rank.
        layout = runner.layout
        copies = layout.num_ranks if scheduler.book.members == 1 else layout.head_groups
        self._page_bytes = [nbytes * copies for nbytes in runner.cache.page_bytes]

    # ------------------------------------------------------------- from any thread

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._check(request)
        with self._lock:
            if self._failure:
                raise StoppingError(f"the engine has failed: {self._failure}")
            if self._stopping:
                raise StoppingError("the engine is stopping and takes no more requests.")
            room = self.capacity.max_sequences + self.capacity.max_waiting - len(self._sequences)
            if len(requests) > room:
                raise QueueFullError(
                    f"{len(self._sequences)} sequences are under way or wait, and there is room for "
                    f"{max(0, room)} more, not {len(requests)}. Try again later."
                )
            for request in requests:
                sampling = request.sampling
                if sampling.seed is None:
                    seed = secrets.randbelow(MAX_SEED + 1)
                    sampling = dataclasses.replace(sampling, seed=seed)
                running = Running(request, sampling, request.number, list(request.prompt))
                self._sequences[request.number] = running
                self._arrived.append(running)
            self._lock.notify()

    def cancel(self, request: Request) -> None:
        with self._lock:
            self._cancelled.append(request)
            self._lock.notify()

    def stats(self) -> Stats:
        scheduler = self._scheduler
        book = scheduler.book
        pages = zip(book.used_by_kind, self._page_bytes, strict=True)
        return dataclasses.replace(
            self._counters,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._arrived),
            pages_used=book.used,
            pages_total=book.total,
            cache_bytes_used=sum(used * nbytes for used, nbytes in pages),
            pages_kept=book.kept,
            preemptions=scheduler.preemptions,
            prefix_asked_tokens=scheduler.prefix_tokens.asked,
            prefix_found_tokens=scheduler.prefix_tokens.found,
        )

    def stop(self, within: float = math.inf) -> None:
        """See `helix_megatron.inference.request.Engine`. What has not ended within so many seconds is
        cancelled."""
        with self._lock:
            self._stopping = True
            self._deadline = time.monotonic() + within
            self._lock.notify()

    @property
    def failure(self) -> str:
        return self._failure

    def fail(self, reason: str) -> int:
        """End every sequence with an error. The loop need not be alive: another rank may hold it for ever.

        Args:
            reason: for clients; what they should not know belongs in the log.

        Returns:
            How many sequences it ended.
        """
        with self._lock:
            if self._failure:
                return 0
            self._failure = reason
            left = list(self._sequences.values())
            self._sequences.clear()
        for sequence in left:
            _say(sequence, Output(reason="error", error=reason))
        return len(left)

    # ------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Step until `stop` was called and every sequence has ended. Collective: the others are in `follow`.

        Raises:
            Exception: whatever a step raised, after every sequence was told.
        """
        try:
            while self._wait():
                self._step()
            self._tell(self._scheduler.last_plan())
        except BaseException:
            self.fail("a step failed; the server's log says why.")
            raise

    def _wait(self) -> bool:
        """Take in what was asked meanwhile, waiting a moment where nothing is to be done; False at the end."""
        with self._lock:
            if self._scheduler.idle and not self._arrived and not self._stopping:
                self._lock.wait(HEARTBEAT_SECONDS)
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
            ended = self._stopping and self._scheduler.idle and not arrived
        for sequence in arrived:
            self._scheduler.add(sequence)
        for request in cancelled:
            unwanted = self._sequences.get(request.number)
            if unwanted is not None:
                self._scheduler.remove(unwanted)
                self._end(unwanted, Output(reason="cancelled"))
        if time.monotonic() > self._deadline:
            for late in [*self._scheduler.running, *self._scheduler.waiting]:
                self._scheduler.remove(late)
                self._end(late, Output(reason="cancelled"))
        return not ended

    def _step(self) -> None:
        plan, wanted = self._scheduler.plan()
        decoding = sum(1 for sequence in wanted if sequence.generated)
        if not plan.pieces and not plan.drops and self._runner.group.size() == 1:
            return
        begin = time.perf_counter()
        self._tell(plan)
        logits = self._runner.run(plan)
        if logits is not None:
            self._use(logits, plan, wanted)
        self._count(plan, decoding, len(wanted), time.perf_counter() - begin)

    def _use(self, logits: Tensor, plan: StepPlan, wanted: Sequence[Running]) -> None:
        """Give every sequence what the logits of a step say, the rows of its piece."""
        ends = dict(zip([piece.sequence for piece in plan.pieces], plan.ends, strict=True))
        for sequence in self._scheduler.running:
            if sequence.reads_prompt and sequence.number in ends:
                self._read_prompt(sequence, logits, ends[sequence.number], plan)
        places: dict[Running, Place] = {}
        for s in wanted:
            try:
                allowed = _allowed(s, logits.size(1))
                places[s] = Place(s.sampling, s.generated, s.tokens, allowed)
            except HelixError as error:
                self._lose(s, str(error))
        if not places:
            return
        rows = [ends[sequence.number] - 1 for sequence in places]
        chosen = sample(logits if len(rows) == len(logits) else logits[rows], [*places.values()])
        for sequence, choice in zip(places, chosen, strict=True):
            if choice is None:
                self._lose(sequence, NOT_FINITE)
            else:
                self._give(sequence, choice)

    def _lose(self, sequence: Running, error: str) -> None:
        """End a sequence that cannot go on; the others are not concerned."""
        self._scheduler.remove(sequence)
        self._end(sequence, Output(reason="error", error=error))

    def _read_prompt(self, sequence: Running, logits: Tensor, end: int, plan: StepPlan) -> None:
        """Take the log-probabilities of the prompt's tokens that follow those of this step."""
        piece = next(piece for piece in plan.pieces if piece.sequence == sequence.number)
        following = sequence.request.prompt[piece.start + 1 : piece.stop + 1]
        if piece.start == 0:
            sequence.prompt_logprobs.clear()  # it was preempted
        first = end - piece.wanted
        top = sequence.sampling.prompt_logprobs or 0
        rows = logits[first : first + len(following)]
        sequence.prompt_logprobs += logprobs_of(rows, following, top)

    def _tell(self, plan: StepPlan) -> None:
        tell(plan, self._runner.plans)

    def _give(self, sequence: Running, choice: Chosen) -> None:
        first = not sequence.generated
        reason = self._scheduler.give(sequence, choice.token)
        constraint = sequence.request.constraint
        if constraint is not None and reason != "stop":
            try:
                reason = "stop" if constraint.accept(choice.token) else reason
            except HelixError as error:
                self._lose(sequence, str(error))
                return
        output = Output(
            (choice.token,),
            reason,
            logprobs=() if choice.logprobs is None else (choice.logprobs,),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
            shared=sequence.shared if first else 0,
        )
        if reason is None:
            with self._lock:  # `fail` may have ended it meanwhile
                if sequence.request.number in self._sequences:
                    _say(sequence, output)
            return
        self._scheduler.remove(sequence)
        self._end(sequence, output)

    def _end(self, sequence: Running, output: Output) -> None:
        with self._lock:
            known = self._sequences.pop(sequence.request.number, None)
        if known is not None:
            _say(sequence, output)

    def _count(self, plan: StepPlan, decoding: int, generated: int, seconds: float) -> None:
        before = self._counters
        self._counters = Stats(
            prompt_tokens=before.prompt_tokens + plan.num_tokens - decoding,
            generated_tokens=before.generated_tokens + generated,
            steps=before.steps + bool(plan.pieces),
            step_seconds=before.step_seconds + seconds * bool(plan.pieces),
        )

    def _check(self, request: Request) -> None:
        capacity, prompt = self.capacity, request.prompt
        if not prompt:
            raise HelixError("the prompt is empty. Give at least one token.")
        length = len(prompt) + request.sampling.max_tokens
        if length > capacity.max_context:
            raise HelixError(
                f"a prompt of {len(prompt)} tokens and max_tokens of {request.sampling.max_tokens} are "
                f"{length} tokens, and the longest context is {capacity.max_context}. Shorten the prompt, or "
                f"ask for at most {max(0, capacity.max_context - len(prompt))} tokens."
            )
        wrong = next((t for t in prompt if not 0 <= t < capacity.vocab_size), None)
        if wrong is not None:
            raise _no_such_token(wrong, capacity)
        for token, _ in request.sampling.logit_bias:
            if not 0 <= token < capacity.vocab_size:
                raise _no_such_token(token, capacity)


def _allowed(sequence: Running, vocabulary: int) -> np.ndarray | None:
    constraint = sequence.request.constraint
    return None if constraint is None else constraint.allowed(vocabulary)


def _no_such_token(token: int, capacity: Capacity) -> HelixError:
    return HelixError(
        f"token {token} does not exist. Valid tokens: 0 to {capacity.vocab_size - 1}."
    )


def _say(sequence: Running, output: Output) -> None:
    """Tell a listener; one that raises harms nobody else."""
    try:
        sequence.request.listener(output)
    except Exception:
        LOGGER.exception("the listener of a sequence failed")


def follow(runner: Runner) -> None:
    """What every rank but 0 does: compute with it what it says, until it says that there is no more."""
    while True:
        plan = hear(runner.plans)
        runner.run(plan)
        if plan.last:
            return
