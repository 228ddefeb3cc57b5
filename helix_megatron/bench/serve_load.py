"""The load of `bench serve`: requests at the times of a Poisson process, sent by OpenAI's client."""

from __future__ import annotations

import asyncio
import random
import statistics
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helix_megatron.errors import HelixError

LETTERS = string.ascii_lowercase + " "
TIMEOUT_SECONDS = 3600.0  # only ends a hang


@dataclass(frozen=True)
class Workload:
    """What every server is asked.

    Args:
        requests: how many there are.
        rate: how many come in a second on average; 0 sends all at once.
        prompt_tokens: tokens of a prompt, each a letter.
        common_tokens: how many of them, at the beginning, are the same in all prompts.
        max_tokens: tokens to generate.
        seed: of prompts and arrivals.
    """

    requests: int
    rate: float
    prompt_tokens: int
    common_tokens: int
    max_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.common_tokens > self.prompt_tokens:
            raise HelixError(
                f"--common-tokens is {self.common_tokens}, and a prompt has {self.prompt_tokens} tokens. "
                f"Valid: up to {self.prompt_tokens}."
            )

    def prompts(self) -> list[str]:
        """A letter for each token."""
        source = random.Random(self.seed)
        common = _letters(source, self.common_tokens)
        rest = self.prompt_tokens - self.common_tokens
        return [common + _letters(source, rest) for _ in range(self.requests)]

    def arrivals(self) -> list[float]:
        """Seconds from the beginning, ascending; the gaps are exponentially distributed."""
        source = random.Random(self.seed + 1)
        if not self.rate:
            return [0.0] * self.requests
        at, times = 0.0, []
        for _ in range(self.requests):
            at += source.expovariate(self.rate)
            times.append(at)
        return times


@dataclass(frozen=True)
class Answered:
    """One request: its text, and when something came, in seconds from when it should have been sent."""

    text: str
    tokens: int
    times: tuple[float, ...]

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0]

    @property
    def each(self) -> float | None:
        """Seconds between two tokens, on average; None of a single one."""
        return (self.times[-1] - self.first) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Load:
    """What came of a workload at one server. `seconds` are from the first arrival to the last token."""

    answers: tuple[Answered, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return sum(answer.tokens for answer in self.answers)

    def firsts(self) -> list[float]:
        """Seconds to the first token of each request."""
        return [answer.first for answer in self.answers]

    def eaches(self) -> list[float]:
        """Seconds per further token of each request."""
        return [answer.each for answer in self.answers if answer.each is not None]


def percentile(values: Sequence[float], percent: int) -> float:
    """Of at least one value, between neighbours in proportion."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def send(workload: Workload, url: str, model: str) -> Load:
    """Send a workload to a server, after two requests that are not counted.

    Raises:
        HelixError: a request failed, or the client is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise HelixError("bench serve needs OpenAI's client. Try pip install openai.") from error
    try:
        return asyncio.run(_send(workload, url, model))
    except openai.OpenAIError as error:
        raise HelixError(f"{url} refused or lost a request: {error}.") from error


async def _send(workload: Workload, url: str, model: str) -> Load:
    import openai

    options: dict[str, Any] = {"max_retries": 0, "timeout": TIMEOUT_SECONDS}
    async with openai.AsyncOpenAI(base_url=url, api_key="none", **options) as client:
        for number in range(2):
            warm = _letters(random.Random(-1 - number), workload.prompt_tokens)
            await _ask(client, model, warm, workload.max_tokens, time.perf_counter())
        began = time.perf_counter()
        answers = await asyncio.gather(
            *(
                _ask(client, model, prompt, workload.max_tokens, began + at)
                for prompt, at in zip(workload.prompts(), workload.arrivals(), strict=True)
            )
        )
        return Load(tuple(answers), time.perf_counter() - began)


async def _ask(client: Any, model: str, prompt: str, max_tokens: int, at: float) -> Answered:
    """Send a request at a moment of `time.perf_counter`; being late counts as waiting."""
    await asyncio.sleep(at - time.perf_counter())
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
    )
    texts, times = [], []
    async for chunk in stream:
        text = chunk.choices[0].text if chunk.choices else ""
        if text:
            texts.append(text)
            times.append(time.perf_counter() - at)
    if not times:
        raise HelixError("a request got no text. Give a model whose tokens have texts.")
    text = "".join(texts)
    return Answered(text, len(text), tuple(times))


def _letters(source: random.Random, count: int) -> str:
    return "".join(source.choices(LETTERS, k=count))
