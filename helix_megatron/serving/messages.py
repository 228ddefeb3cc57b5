"""The turns of a conversation as clients send them."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator
from pydantic_core import PydanticCustomError, from_json

from helix_megatron.serving import fields
from helix_megatron.serving.strict import Strict, kind


class TextPart(Strict):
    """A part of a message."""

    neutral = fields.NEUTRAL_PART
    ignored = fields.IGNORED_OF_PART
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("parts")],
    Discriminator(
        kind,
        custom_error_type="content",
        custom_error_message="Valid: a string, or a list, not empty, of text parts",
    ),
]


class Message(Strict):
    """One turn of a conversation. What templates may look at is passed on to them."""

    neutral = fields.NEUTRAL_MESSAGE
    ignored = fields.IGNORED_OF_MESSAGE
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(default=None, description="Only an assistant may say nothing.")
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, JsonValue]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError(
                "no_content", "content is required for role {role}", {"role": self.role}
            )
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates have it: they know no `developer`, which is OpenAI's new name of `system`."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        calls = [_with_parsed_arguments(call) for call in self.tool_calls or ()]
        others = self.model_dump(include={"name", "reasoning_content", "tool_call_id"})
        others = others | {"tool_calls": calls or None}
        return {"role": role, "content": content} | {
            name: value for name, value in others.items() if value is not None
        }


class Function(Strict):
    """A function that the model may call."""

    neutral = fields.NEUTRAL_FUNCTION
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = Field(
        default=None, description="A JSON Schema of its arguments, which the model is told of."
    )


class Tool(Strict):
    """What the model may use: functions, which the client runs."""

    type: Literal["function"]
    function: Function


def _with_parsed_arguments(call: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A call of a tool as templates have it: OpenAI's API has its arguments as JSON in a string."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), str):
        with contextlib.suppress(ValueError):
            return call | {"function": function | {"arguments": from_json(arguments)}}
    return call
