"""What is asked of the engine, and what it answers. Imports nothing heavy: the server's side of the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from helix_megatron.errors import HelixError
from helix_megatron.flags import check_values, setting

if TYPE_CHECKING:
    import numpy as np

    from helix_megatron.inference.answers import AnswerParser, Tool

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are chosen. Those of `stop_tokens` end it, each the last of its output.

    The logits are changed in this order: `logit_bias`, a number for each token it names, is added; then come
    the penalties, the temperature, `top_k`, `top_p` and `min_p`, as in Hugging Face's `generate`.
    Log-probabilities are those of the model, before any of it.

    Args:
        logprobs: of how many of the likeliest tokens to give the log-probability, beside each token's own; None
            gives none.
        prompt_logprobs: the same for the tokens of the prompt.

    Raises:
        HelixError: a value out of range, with the valid ones.
    """

    max_tokens: int = setting(16, "the most tokens that are generated")
    temperature: float = setting(1.0, "what the logits are divided by; 0 is greedy")
    top_k: int = setting(0, "how many of the likeliest tokens may be chosen; 0: all", at_least=0)
    top_p: float = setting(
        1.0, "the probability of those that may be chosen, together", above=0, at_most=1
    )
    min_p: float = setting(
        0.0, "how probable a token must be at least, of the likeliest one's probability", at_most=1
    )
    presence_penalty: float = setting(
        0.0,
        "what is taken off the logit of a token that was generated before",
        at_least=-2,
        at_most=2,
    )
    frequency_penalty: float = setting(
        0.0, "the same, as often as the token was generated", at_least=-2, at_most=2
    )
    repetition_penalty: float = setting(
        1.0,
        "what positive logits of tokens in prompt or output are divided by, and negative ones multiplied with",
        above=0,
    )
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = setting(None, "how many alternatives", at_least=0)
    prompt_logprobs: int | None = setting(None, "how many alternatives", at_least=0)
    seed: int | None = setting(
        None, "of the random numbers; drawn when not given", at_least=0, largest=MAX_SEED
    )
    stop_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Whether a token's logit depends on more than the model."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return bool(self.logit_bias) or any(penalties)


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token, and those of the likeliest tokens in its place, in descending order."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """News of one sequence: tokens since the last news, and how it ended if it did.

    `reason` is None while it goes on, then `stop` (a stop token), `length` (max_tokens or the longest context),
    `cancelled`, or `error` with a text in `error`.

    `logprobs` has an entry for each token where they were asked for. With the first token come
    `prompt_logprobs`, of all tokens of the prompt but the first, and `shared`, the number of the prompt's
    tokens that were not computed since another sequence began alike.
    """

    tokens: tuple[int, ...] = ()
    reason: FinishReason | None = None
    error: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    shared: int = 0


class Constraint(Protocol):
    """What a text must be, told token by token. Each text has its own."""

    def allowed(self, size: int) -> np.ndarray:
        """Which of the `size` tokens may come next: bool [size], at least one.

        Raises:
            HelixError: none may.
        """

    def accept(self, token: int) -> bool:
        """Take the token that was chosen; whether the text is complete and cannot go on.

        Raises:
            HelixError: the token was not allowed.
        """


_numbers = itertools.count(1)


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Args:
        prompt: the token ids of the prompt, at least one.
        sampling: how tokens are chosen.
        listener: what is called with each `Output`, in order, from a thread of the engine. It must return
            at once and not raise. The last one has a `reason`.
        constraint: what the output must be; the sequence ends when it is complete.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    listener: Callable[[Output], None]
    constraint: Constraint | None = None
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass(frozen=True)
class Capacity:
    """What bounds a request.

    Args:
        vocab_size: the number that valid token ids are below.
        max_context: the most tokens of prompt and output of one sequence together.
        max_sequences: how many sequences are generated at the same time.
        max_waiting: how many wait beyond that; one more is refused.
    """

    vocab_size: int
    max_context: int
    max_sequences: int
    max_waiting: int


@dataclass(frozen=True)
class Stats:
    """What the engine does at one moment, and what it has done since its start.

    Args:
        running, waiting: the numbers of sequences at this moment.
        pages_used, pages_total: pages of the key-value cache, over all ranks of a head group.
        pages_kept: those that no sequence uses, and that one which begins alike may use.
        cache_bytes_used: the bytes of the pages in use, over all ranks.
        prompt_tokens, generated_tokens, steps, preemptions: how many there have been.
        step_seconds: the time that the steps have taken.
        prefix_asked_tokens: tokens of all prompts that have begun.
        prefix_found_tokens: how many of them were not computed, since another sequence began alike.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    pages_kept: int = 0
    cache_bytes_used: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    step_seconds: float = 0.0
    prefix_asked_tokens: int = 0
    prefix_found_tokens: int = 0


class QueueFullError(HelixError):
    """As many requests wait as may."""


class StoppingError(HelixError):
    """The engine takes no more requests: it is stopping, or it has failed."""


class TemplateLimitError(HelixError):
    """The model's chat template took more time or memory than it may."""


class Engine(Protocol):
    """What the server needs of an engine. All methods may be called from any thread."""

    capacity: Capacity

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all of them, or none.

        Raises:
            HelixError: a token that does not exist, an empty prompt, or too long a context.
            QueueFullError: there is no room for all of them.
            StoppingError: the engine takes no more.
        """

    def cancel(self, request: Request) -> None:
        """Stop a sequence and free its pages. Its listener hears `cancelled`, unless it ended before."""

    def stats(self) -> Stats:
        """What the engine does now, and has done."""

    def stop(self) -> None:
        """Take no more requests, finish those that are there, and end the engine's loop."""

    @property
    def failure(self) -> str:
        """Why the engine failed; empty while it runs well."""


class Tokens(Protocol):
    """Text to tokens and back, as the server and the command line need it."""

    vocab_size: int
    stop_tokens: frozenset[int]  # what ends a text: end of sequence, end of turn

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Token ids of a text. Takes time and memory in proportion to it, and lets other threads run.

        Args:
            begin: with what the model wants in front (beginning of sequence).

        Raises:
            HelixError: it is no text.
        """

    def chat_text(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool] = ()) -> str:
        """The text of a conversation, ready for the assistant's answer, to be encoded without `begin`.

        Args:
            tools: functions that the model may call.

        Raises:
            HelixError: the model has no chat template, or the template refuses these messages.
            TemplateLimitError: the template takes too long.
        """

    def close(self) -> None:
        """End what was started for `chat_text`, which fails from now on."""

    def answers(self, tools: Sequence[Tool]) -> Callable[[str], AnswerParser]:
        """What makes a parser of an answer that may call tools, given the text of the conversation before it.

        Raises:
            HelixError: the model is not told of tools, or it is not known how it writes calls.
        """

    def token_text(self, token: int) -> tuple[str, bytes | None]:
        """The text of one token by itself, and its bytes where they are known."""

    def decoder(self, after: Sequence[int] = (), special: bool = False) -> TextStream:
        """A decoder of one sequence's output, which comes after these tokens.

        Args:
            special: with the text of special tokens, but for those that end a text.
        """


class TextStream(Protocol):
    """Tokens in, text out as soon as it is certain: no half characters."""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add, as far as it is complete."""

    def finish(self) -> str:
        """What was held back."""
