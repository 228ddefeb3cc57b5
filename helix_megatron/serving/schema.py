"""What a client may ask, as OpenAI's reference has it: types are strict, numbers are bounded.

Unknown fields are refused (`fields.complaint`), so that a misspelt one is not silently without effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonDict
from pydantic_core import PydanticCustomError, from_json

from helix_megatron.inference.request import MAX_SEED
from helix_megatron.serving import fields
from helix_megatron.serving.api_errors import ApiError, shown

MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # what may be held back of a stream, in characters
LARGEST_TOKEN = 2**31 - 1


def _publish(schema: JsonDict, model: type[Any]) -> None:
    """The fields that `fields.complaint` checks are a part of the published schema."""
    properties = schema["properties"]
    assert isinstance(properties, dict)
    properties.update(fields.published(model.neutral, model.ignored))  # type: ignore[arg-type]
    schema["additionalProperties"] = False


class _Strict(BaseModel):
    """No conversions: "1" is not 1, and true is not 1."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=_publish)
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _no_other_fields(self) -> _Strict:
        found = fields.complaint(type(self).model_fields, self.model_extra or {}, self.neutral)
        if found:
            raise PydanticCustomError("unsupported", "{message}", {"message": found[1]})
        return self


def _kind(value: object) -> str | None:
    """Which of the union's types a value means, by its first element: only that one is validated."""
    if isinstance(value, list):
        first = value[0] if value else None
        kinds = {str: "strings", int: "tokens", list: "token lists", dict: "parts"}
        return kinds.get(type(first))
    return "string" if isinstance(value, str) else None


_KINDS = frozenset(
    {"string", "strings", "tokens", "token lists", "parts"}
)  # not fields of a request

Token = Annotated[int, Field(ge=0, le=LARGEST_TOKEN)]
TokenList = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("strings")]
    | Annotated[TokenList, Tag("tokens")]
    | Annotated[list[TokenList], Field(min_length=1, fail_fast=True), Tag("token lists")],
    Discriminator(
        _kind,
        custom_error_type="prompt",
        custom_error_message="Valid: a string, or a list, not empty, of strings, of token ids, or of "
        "lists of token ids",
    ),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    Annotated[StopString, Tag("string")]
    | Annotated[list[StopString], Field(min_length=1, max_length=MAX_STOPS), Tag("strings")],
    Discriminator(
        _kind,
        custom_error_type="stop",
        custom_error_message=f"Valid: a string, or a list of 1 to {MAX_STOPS} strings",
    ),
]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("parts")],
    Discriminator(
        _kind,
        custom_error_type="content",
        custom_error_message="Valid: a string, or a list, not empty, of text parts",
    ),
]


class Message(_Strict):
    """One turn of a conversation."""

    neutral = fields.NEUTRAL_MESSAGE
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def plain(self) -> dict[str, str]:
        """As chat templates have it: they know no `developer`, which is OpenAI's new name of `system`."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(
        default=None, description="Accepted and ignored: events are not padded."
    )


class GenerationRequest(_Strict):
    """What completions and chat have in common. Null means the default."""

    ignored = fields.IGNORED

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=LARGEST_TOKEN)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST_TOKEN)] | None = Field(
        default=None, description="An extension: the k most likely tokens only; 0 or -1: all."
    )
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(
        default=None, description="An extension: go on to max_tokens, whatever the model says."
    )

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def length(self) -> int | None:
        """How many tokens at most, if the client said so."""
        return self.max_tokens

    @model_validator(mode="after")
    def _options_of_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options is only valid with stream true"
            )
        return self


class CompletionRequest(GenerationRequest):
    """Of `/v1/completions`."""

    neutral = fields.NEUTRAL_COMPLETION

    prompt: Prompt
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(
        default=None, description="Not supported: accepted if it equals n."
    )

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise PydanticCustomError(
                "best_of",
                "best_of is not supported. Valid: leave it out, or the value of n, {n}",
                {"n": self.n or 1},
            )
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more texts, or as many lists of token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return prompt


class ChatRequest(GenerationRequest):
    """Of `/v1/chat/completions`."""

    neutral = fields.NEUTRAL_CHAT

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=LARGEST_TOKEN)] | None = None

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if (
            None not in (pair := (self.max_tokens, self.max_completion_tokens))
            and len(set(pair)) > 1
        ):
            raise PydanticCustomError(
                "max_tokens",
                "max_tokens is {old} and max_completion_tokens {new}. Give one of them",
                {"old": pair[0], "new": pair[1]},
            )
        return self


Body = TypeVar("Body", bound=GenerationRequest)


def parse(body: bytes, model: type[Body]) -> Body:
    """The body of a request.

    Raises:
        ApiError: 400, with the first thing that is wrong.
    """
    try:
        # Its depth is bounded, other than that of Python's own parser; NaN is not JSON.
        values: JsonValue = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"The body is {shown(values)}. Valid: a JSON object.")
    # Before the types: who misspells a required field must not only hear that it is missing.
    found = fields.complaint(model.model_fields, values, model.neutral, model.ignored)
    if found:
        name, message = found
        raise ApiError(400, message, param=name[:80])
    try:
        return model.model_validate(
            {name: values[name] for name in values if name in model.model_fields}
        )
    except ValidationError as error:
        raise _first(error, model) from None


def _first(error: ValidationError, model: type[GenerationRequest]) -> ApiError:
    details = error.errors(include_url=False, include_context=False)[0]
    path = ""
    for step in details["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in _KINDS:
            path += f".{step}" if path else step
    message = "Valid: a JSON object" if details["type"] == "model_type" else details["msg"]
    if details["type"] == "missing":
        text = f"{path} is required."
    elif not path:
        path = details["type"] if details["type"] in model.model_fields else ""
        text = f"{message}."
    else:
        value = details["input"]
        text = (
            f"{path}: {message}"
            if isinstance(value, dict)
            else f"{path} is {shown(value)}. {message}"
        )
        text = text if text.endswith((".", "?")) else f"{text}."
    return ApiError(400, text, param=path or None)
