"""The two shapes of a response: completions and chat, whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel

from helix_megatron.serving.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    ChatReply,
    CompletionChoice,
    CompletionChunk,
    CompletionReply,
    Finish,
    Usage,
)


class Shape(Protocol):
    """How the texts of a request become a response."""

    def reply(self, texts: Sequence[tuple[str, Finish]], usage: Usage) -> BaseModel:
        """A whole response: the text of each choice, and how it ended."""

    def opening(self, index: int) -> BaseModel | None:
        """The first event of a choice in a stream, before there is any text."""

    def chunk(self, index: int, text: str, reason: Finish | None) -> BaseModel:
        """An event that adds text to a choice, or ends it, or both."""

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The event after the last choice ended."""


class CompletionShape:
    """The responses of `/v1/completions`."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def reply(self, texts: Sequence[tuple[str, Finish]], usage: Usage) -> BaseModel:
        choices = [
            CompletionChoice(index=index, text=text, finish_reason=reason)
            for index, (text, reason) in enumerate(texts)
        ]
        return CompletionReply(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def opening(self, index: int) -> BaseModel | None:
        return None

    def chunk(self, index: int, text: str, reason: Finish | None) -> BaseModel:
        return self._event([CompletionChoice(index=index, text=text, finish_reason=reason)])

    def usage_chunk(self, usage: Usage) -> BaseModel:
        return self._event([], usage)

    def _event(self, choices: list[CompletionChoice], usage: Usage | None = None) -> BaseModel:
        return CompletionChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )


class ChatShape:
    """The responses of `/v1/chat/completions`."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def reply(self, texts: Sequence[tuple[str, Finish]], usage: Usage) -> BaseModel:
        choices = [
            ChatChoice(index=index, message=ChatMessage(content=text), finish_reason=reason)
            for index, (text, reason) in enumerate(texts)
        ]
        return ChatReply(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def opening(self, index: int) -> BaseModel | None:
        delta = ChatDelta(role="assistant", content="")
        return self._event([ChatChunkChoice(index=index, delta=delta, finish_reason=None)])

    def chunk(self, index: int, text: str, reason: Finish | None) -> BaseModel:
        delta = ChatDelta(content=text or None)
        return self._event([ChatChunkChoice(index=index, delta=delta, finish_reason=reason)])

    def usage_chunk(self, usage: Usage) -> BaseModel:
        return self._event([], usage)

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> BaseModel:
        return ChatChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )
