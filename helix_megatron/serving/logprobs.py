"""Log-probabilities as OpenAI's API has them: of tokens as texts, with their bytes where they are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from helix_megatron.inference.request import TokenLogprobs
from helix_megatron.serving.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenAlternative,
    TokenEntry,
)

# A token's text and its bytes; None where the text is all that is known.
TokenText = tuple[str, bytes | None]


@dataclass(frozen=True)
class Entry:
    """A token of a choice. The first one of a prompt has no log-probability: nothing comes before it."""

    token: TokenText
    logprob: float | None
    top: tuple[tuple[TokenText, float], ...] = ()


def entry(found: TokenLogprobs, text_of: Callable[[int], TokenText]) -> Entry:
    """What the engine says of a token, in texts."""
    top = tuple((text_of(token), logprob) for token, logprob in found.top)
    return Entry(text_of(found.token), found.logprob, top)


def completion_logprobs(entries: Sequence[Entry], offset: int) -> CompletionLogprobs:
    """Of `/v1/completions`. The token itself is among the likeliest ones even where it is none of them.

    Args:
        offset: how many characters of the text come before the first of these tokens.
    """
    offsets = []
    for one in entries:
        offsets.append(offset)
        offset += len(one.token[0])
    return CompletionLogprobs(
        tokens=[one.token[0] for one in entries],
        token_logprobs=[one.logprob for one in entries],
        top_logprobs=[_by_text(one) for one in entries],
        text_offset=offsets,
    )


def chat_logprobs(entries: Sequence[Entry]) -> ChatLogprobs:
    """Of `/v1/chat/completions`."""
    return ChatLogprobs(
        content=[
            TokenEntry(
                **_fields(one.token, one.logprob or 0.0),
                top_logprobs=[TokenAlternative(**_fields(*other)) for other in one.top],
            )
            for one in entries
        ]
    )


def _by_text(one: Entry) -> dict[str, float] | None:
    if one.logprob is None:
        return None
    # Several tokens may have the same text: the likeliest one's number stays.
    found = {token[0]: logprob for token, logprob in reversed(one.top)}
    return found | ({} if one.token[0] in found else {one.token[0]: one.logprob})


def _fields(token: TokenText, logprob: float) -> dict[str, Any]:
    text, data = token
    return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}
