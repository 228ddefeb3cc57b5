"""The two shapes of a response: completions and chat, whole and streamed."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel

from helix_megatron.inference.answers import Said
from helix_megatron.serving.logprobs import Entry, chat_logprobs, completion_logprobs
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
    FunctionCall,
    ToolCall,
    ToolCallDelta,
    Usage,
)

Entries = Sequence[Entry] | None  # None where log-probabilities are not given


class Shape(ABC):
    """How the texts of a request become a response, or the events of one."""

    prefix: ClassVar[str]
    whole: ClassVar[type[BaseModel]]
    event: ClassVar[type[BaseModel]]

    def __init__(self, model: str) -> None:
        self._common: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def choice(self, index: int, said: Said, reason: Finish, entries: Entries) -> BaseModel:
        """A choice of a whole response."""

    @abstractmethod
    def piece(self, index: int, said: Said, reason: Finish | None, entries: Entries) -> BaseModel:
        """A choice of an event: it adds text, or ends it, or both."""

    def opening(self, index: int) -> BaseModel | None:
        """The first event of a choice in a stream, before there is any text."""
        return None

    def reply(self, texts: Sequence[tuple[Said, Finish, Entries]], usage: Usage) -> BaseModel:
        """A whole response: what each choice says, how it ended, and its log-probabilities."""
        choices = [self.choice(index, *ended) for index, ended in enumerate(texts)]
        return self.whole(**self._common, choices=choices, usage=usage)

    def chunk(self, index: int, said: Said, reason: Finish | None, entries: Entries) -> BaseModel:
        """An event with a piece of a choice."""
        return self.event(**self._common, choices=[self.piece(index, said, reason, entries)])

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The event after the last choice ended."""
        return self.event(**self._common, choices=[], usage=usage)


class CompletionShape(Shape):
    """The responses of `/v1/completions`."""

    prefix, whole, event = "cmpl", CompletionReply, CompletionChunk

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._offsets: defaultdict[int, int] = defaultdict(int)  # characters of tokens so far

    def choice(
        self, index: int, said: Said, reason: Finish | None, entries: Entries
    ) -> CompletionChoice:
        logprobs = None
        if entries is not None:
            logprobs = completion_logprobs(entries, self._offsets[index])
            self._offsets[index] += sum(len(one.token[0]) for one in entries)
        return CompletionChoice(
            index=index, text=said.content, logprobs=logprobs, finish_reason=reason
        )

    piece = choice


class ChatShape(Shape):
    """The responses of `/v1/chat/completions`."""

    prefix, whole, event = "chatcmpl", ChatReply, ChatChunk

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._calls: defaultdict[int, int] = defaultdict(int)  # of each choice so far

    def choice(self, index: int, said: Said, reason: Finish, entries: Entries) -> BaseModel:
        calls = self._new_calls(index, said)
        message = ChatMessage(
            content=said.content or (None if calls else ""),
            reasoning_content=said.reasoning or None,
            tool_calls=[ToolCall(id=one.id, function=one.function) for one in calls] or None,
        )
        logprobs = None if entries is None else chat_logprobs(entries)
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=reason)

    def piece(self, index: int, said: Said, reason: Finish | None, entries: Entries) -> BaseModel:
        delta = ChatDelta(
            content=said.content or None,
            reasoning_content=said.reasoning or None,
            tool_calls=self._new_calls(index, said) or None,
        )
        logprobs = None if entries is None else chat_logprobs(entries)
        return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)

    def _new_calls(self, index: int, said: Said) -> list[ToolCallDelta]:
        first = self._calls[index]
        self._calls[index] += len(said.calls)
        return [
            ToolCallDelta(
                index=number,
                id=f"call_{uuid.uuid4().hex}",
                function=FunctionCall(name=call.name, arguments=call.arguments),
            )
            for number, call in enumerate(said.calls, first)
        ]

    def opening(self, index: int) -> BaseModel | None:
        delta = ChatDelta(role="assistant", content="")
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=None)
        return self.event(**self._common, choices=[choice])
