"""One response in the making: its sequences in the engine, and their text."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from helix_megatron.errors import HelixError
from helix_megatron.inference.answers import AnswerParser, Said, whole
from helix_megatron.inference.request import (
    Constraint,
    Engine,
    Output,
    Request,
    Sampling,
    Tokens,
)
from helix_megatron.inference.stop_strings import StopStrings
from helix_megatron.serving.api_errors import ApiError, from_engine, unavailable
from helix_megatron.serving.logprobs import Entry, entry
from helix_megatron.serving.mailbox import Mailbox
from helix_megatron.serving.metrics import Metrics
from helix_megatron.serving.replies import Finish, PromptTokensDetails, Usage


@dataclass(frozen=True)
class Plan:
    """What a request asks of the engine, ready to be submitted.

    Args:
        prompts: the token ids of each prompt.
        samplings: how each prompt's choices are sampled. Choices are numbered prompt by prompt.
        stops: the strings that end a choice.
        echoes: the texts of the prompts, where the choices begin with them.
        returned: how many choices of each prompt are returned: those whose tokens are likeliest on average.
        logprobs: whether log-probabilities are returned.
        constraint: what makes a constraint for each choice, where they have one.
        answers: what makes a parser of each choice, where they may call tools.
        one_call: whether a choice ends with the first call of a tool.
    """

    prompts: tuple[tuple[int, ...], ...]
    samplings: tuple[tuple[Sampling, ...], ...]
    stops: tuple[str, ...]
    echoes: tuple[str, ...] = ()
    returned: int = 1
    logprobs: bool = False
    constraint: Callable[[], Constraint] | None = None
    answers: Callable[[], AnswerParser] | None = None
    one_call: bool = False


# A decoder knows by the end of the prompt whether a space belongs between it and the output.
CONTEXT_TOKENS = 16


class Choice:
    """One sequence: from the engine's tokens to text.

    `tokens` counts what was generated, a stop token too; `reason` is None until it has ended.
    """

    def __init__(
        self, index: int, request: Request, tokens: Tokens, plan: Plan, echo: str | None
    ) -> None:
        self.index = index
        self.request = request
        self.tokens = 0
        self.shared = 0  # tokens of the prompt that were not computed
        self.logprob = 0.0  # of all its tokens together
        self._text_of = tokens.token_text
        self._echo = echo
        self._gives_logprobs = plan.logprobs
        self._entries: list[Entry] = []
        self._answer = plan.answers() if plan.answers else None
        self._one_call, self._calls = plan.one_call, 0
        # What calls are written between may be special tokens.
        decoder = tokens.decoder(request.prompt[-CONTEXT_TOKENS:], special=plan.answers is not None)
        stops = StopStrings(plan.stops)
        self.reason: Finish | None = None
        self.first_token_at = 0.0
        self._decoder = decoder
        self._stops = stops

    def take(self, output: Output) -> Said:
        """What is certain now.

        Raises:
            ApiError: the sequence ended without a result.
        """
        if output.reason == "error":
            raise ApiError(500, f"The engine failed: {output.error}", code="engine_failure")
        if output.reason == "cancelled":
            raise unavailable("it is stopping, and this request was not finished.")
        echo = ""
        if not self.tokens:
            self.shared = output.shared
            echo = self._echo or ""
            if self._echo is not None:
                self._read_prompt(output)
        self.tokens += len(output.tokens)
        hidden = self.request.sampling.stop_tokens
        self.logprob += sum(one.logprob for one in output.logprobs)
        if self._gives_logprobs:
            shown = [one for one in output.logprobs if one.token not in hidden]
            self._entries += [entry(one, self._text_of) for one in shown]
        text = self._decoder.add([token for token in output.tokens if token not in hidden])
        if output.reason is not None:
            text += self._decoder.finish()
        text = self._stops.add(text)
        if self._stops.hit:
            self.reason = "stop"
        elif output.reason is not None:
            text += self._stops.finish()
            self.reason = output.reason
        return Said(echo + text) if self._answer is None else self._parsed(self._answer, text)

    def _parsed(self, answer: AnswerParser, text: str) -> Said:
        said = answer.add(text)
        if self.reason is not None:
            cut = self.reason == "length" or self._stops.hit
            said = whole([said, answer.finish(cut=cut)])
        self._calls += len(said.calls)
        if said.calls and self._one_call:
            said, self.reason = Said(said.content, said.reasoning, said.calls[:1]), "tool_calls"
        elif self._calls and self.reason == "stop":
            self.reason = "tool_calls"
        return said

    def take_entries(self) -> list[Entry] | None:
        """The log-probabilities since the last call; None where there are none to give."""
        entries, self._entries = self._entries, []
        return entries if self._gives_logprobs else None

    def _read_prompt(self, output: Output) -> None:
        if self._gives_logprobs:
            self._entries.append(Entry(self._text_of(self.request.prompt[0]), None))
            self._entries += [entry(one, self._text_of) for one in output.prompt_logprobs]


class Generation:
    """The sequences of one response.

    Args:
        plan: what to generate; the engine gets all of it, or none.
        started: when the HTTP request came, in `time.perf_counter` seconds.

    Raises:
        ApiError: the engine refuses.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: Tokens,
        mailbox: Mailbox,
        metrics: Metrics,
        plan: Plan,
        started: float,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._started = started
        self._inbox: asyncio.Queue[tuple[int, Output | ApiError]] = asyncio.Queue()
        self._prompt_tokens = sum(map(len, plan.prompts))
        self._plan = plan
        self.choices: list[Choice] = []
        for number, (prompt, samplings) in enumerate(
            zip(plan.prompts, plan.samplings, strict=True)
        ):
            echo = plan.echoes[number] if plan.echoes else None
            for sampling in samplings:
                index = len(self.choices)
                listener = mailbox.listener(functools.partial(self._put, index))
                constraint = plan.constraint() if plan.constraint else None
                request = Request(prompt, sampling, listener, constraint)
                self.choices.append(Choice(index, request, tokens, plan, echo))
        try:
            engine.submit([choice.request for choice in self.choices])
        except HelixError as error:
            raise from_engine(error, engine.failure) from None
        metrics.prompt_tokens.inc(self._prompt_tokens)

    def _put(self, index: int, output: Output) -> None:
        self._inbox.put_nowait((index, output))

    @property
    def open(self) -> bool:
        return any(choice.reason is None for choice in self.choices)

    async def pieces(self) -> list[tuple[Choice, Said]]:
        """What is said next, as soon as there are any, one of each choice that has news.

        A choice that ends with its piece has a `reason`.

        Raises:
            ApiError: the engine failed, or `abort` was called.
        """
        pieces: dict[Choice, list[Said]] = {}
        news = [await self._inbox.get()]
        while not self._inbox.empty():
            news.append(self._inbox.get_nowait())
        for index, output in news:
            if isinstance(output, ApiError):
                raise output
            choice = self.choices[index]
            if choice.reason is not None:
                continue  # a stop string ended it when the engine was a step ahead
            pieces.setdefault(choice, []).append(choice.take(output))
            self._observe(choice, len(output.tokens))
            if choice.reason is not None and output.reason is None:
                self._engine.cancel(choice.request)
        return [(choice, whole(parts)) for choice, parts in pieces.items()]

    def abort(self, error: ApiError) -> None:
        """End it with an error, from the event loop's thread."""
        self._inbox.put_nowait((0, error))

    def best(self) -> list[Choice]:
        """The choices that are returned, prompt by prompt; of more, the likeliest ones, best first."""
        found: list[Choice] = []
        for choices in self._by_prompt():
            if len(choices) > self._plan.returned:
                choices.sort(key=lambda choice: -choice.logprob / max(1, choice.tokens))
            found += choices[: self._plan.returned]
        return found

    def usage(self) -> Usage:
        """The tokens that were read and generated so far."""
        completion = sum(choice.tokens for choice in self.choices)
        shared = sum(choices[0].shared for choices in self._by_prompt())
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion,
            total_tokens=self._prompt_tokens + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=shared),
        )

    def _by_prompt(self) -> list[list[Choice]]:
        each = len(self._plan.samplings[0])
        return [self.choices[at : at + each] for at in range(0, len(self.choices), each)]

    def _observe(self, choice: Choice, new_tokens: int) -> None:
        now = time.perf_counter()
        if new_tokens:
            self._metrics.generated_tokens.inc(new_tokens)
            if choice.tokens == new_tokens:
                choice.first_token_at = now
                self._metrics.first_token_seconds.observe(now - self._started)
        if choice.reason is not None and choice.tokens > 1:
            between = (now - choice.first_token_at) / (choice.tokens - 1)
            self._metrics.output_token_seconds.observe(between)

    def close(self) -> None:
        """Cancel the sequences that are not finished."""
        for choice in self.choices:
            if choice.reason is None:
                self._engine.cancel(choice.request)
