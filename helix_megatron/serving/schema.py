"""What a client may ask, as OpenAI's reference has it: types are strict, numbers are bounded.

Unknown fields are refused, so that a misspelt one is not silently without effect.
"""

from __future__ import annotations

import gc
from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from helix_megatron.inference.request import MAX_SEED
from helix_megatron.serving import fields
from helix_megatron.serving.api_errors import ApiError, shown
from helix_megatron.serving.messages import Message, Tool
from helix_megatron.serving.strict import (
    KINDS,
    LARGEST_TOKEN,
    Finite,
    Strict,
    Token,
    TokenList,
    kind,
)

MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # what may be held back of a stream, in characters
MAX_BIASES = 1024
MAX_ALTERNATIVES = 20
MAX_TOOLS = 128


Prompt = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("strings")]
    | Annotated[TokenList, Tag("tokens")]
    | Annotated[list[TokenList], Field(min_length=1, fail_fast=True), Tag("token lists")],
    Discriminator(
        kind,
        custom_error_type="prompt",
        custom_error_message="Valid: a string, or a list, not empty, of strings, of token ids, or of "
        "lists of token ids",
    ),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    Annotated[StopString, Tag("string")]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag("strings")],
    Discriminator(
        lambda value: "strings" if value == [] else kind(value),
        custom_error_type="stop",
        custom_error_message=f"Valid: a string, or a list of up to {MAX_STOPS} strings",
    ),
]
TokenText = Annotated[str, Field(pattern="^[0-9]{1,10}$")]
LogitBias = Annotated[
    dict[TokenText, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)
]


class StreamOptions(Strict):
    """What a stream holds besides the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(
        default=None, description="Accepted and ignored: events are not padded."
    )


class ResponseFormat(Strict):
    """What an answer must be: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, JsonValue] | None = Field(
        default=None, description="Its `schema` is a JSON Schema; `name`, `strict` change nothing."
    )

    @property
    def schema_of_json(self) -> dict[str, Any] | None:
        """The schema of the answer; None where it may be any text."""
        if self.type == "text":
            return None
        schema = (self.json_schema or {}).get("schema") if self.type == "json_schema" else None
        return schema if isinstance(schema, dict) else {"type": "object"}

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        wanted = self.type == "json_schema"
        if wanted != (self.json_schema is not None) or (
            wanted and not isinstance((self.json_schema or {}).get("schema"), dict)
        ):
            raise PydanticCustomError(
                "json_schema",
                "json_schema with an object `schema` belongs to type json_schema, and to no other",
            )
        return self


class GenerationRequest(Strict):
    """What completions and chat have in common. Null means the default."""

    ignored = fields.IGNORED

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=LARGEST_TOKEN)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST_TOKEN)] | None = Field(
        default=None, description="An extension: the k most likely tokens only; 0 or -1: all."
    )
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="An extension: tokens at least so probable, of the likeliest one's probability.",
    )
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = Field(
        default=None,
        description="An extension: what positive logits of tokens in prompt or text are divided by.",
    )
    logit_bias: LogitBias | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = Field(
        default=None, description="An extension: go on to max_tokens, whatever the model says."
    )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """Of how many tokens in each place the log-probability is wanted beside the token's own; None: none."""

    @property
    def choices(self) -> int:
        """How many choices of each prompt are generated."""
        return self.n or 1

    @property
    def length(self) -> int | None:
        """The most tokens to generate, if the client said so."""
        return self.max_tokens

    @model_validator(mode="after")
    def _options_of_streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options is only valid with stream true"
            )
        return self


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    neutral = fields.NEUTRAL_COMPLETION

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(
        default=None,
        description="So many are generated, and those n returned whose tokens are likeliest on average.",
    )

    @model_validator(mode="after")
    def _best_of_at_least_n(self) -> CompletionRequest:
        best_of, n = self.best_of or self.choices, self.n or 1
        if best_of < n:
            raise PydanticCustomError(
                "best_of",
                "best_of is {best_of}. Valid: at least n, which is {n}",
                {"best_of": best_of, "n": n},
            )
        if best_of > n and self.stream:
            raise PydanticCustomError(
                "best_of",
                "best_of is {best_of}, and the best of them are known when all have ended. Valid with stream "
                "true: n, which is {n}",
                {"best_of": best_of, "n": n},
            )
        return self

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def choices(self) -> int:
        return self.best_of or self.n or 1

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
    """The body of `/v1/chat/completions`."""

    neutral = fields.NEUTRAL_CHAT

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=LARGEST_TOKEN)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    parallel_tool_calls: bool | None = Field(
        default=None, description="Whether an answer may call several tools; true by default."
    )

    @model_validator(mode="before")
    @classmethod
    def _tools_that_are_not_used(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        choices = {"tools": values.get("tool_choice"), "functions": values.get("function_call")}
        return {name: value for name, value in values.items() if choices.get(name) != "none"}

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def told_tools(self) -> list[dict[str, Any]]:
        """Give the tools as chat templates have them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @model_validator(mode="after")
    def _text_or_tools(self) -> ChatRequest:
        if self.tools and self.response_format and self.response_format.schema_of_json is not None:
            raise PydanticCustomError(
                "response_format",
                "response_format has every token be a part of a JSON text, so no tool could be called. Valid "
                "with tools: leave it out, or type text",
            )
        return self

    @model_validator(mode="after")
    def _alternatives_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                "top_logprobs",
                "top_logprobs is {top}. Valid without logprobs true: leave it out, or 0",
                {"top": self.top_logprobs},
            )
        return self

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


class TokenizeRequest(Strict):
    """The body of `/tokenize`: a text, or a conversation as its chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="With what the model wants in front of a text; true by default."
    )
    return_token_strs: bool | None = Field(
        default=None, description="Give the text of each token, too."
    )

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "Valid: one of prompt and messages")
        return self


class DetokenizeRequest(Strict):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True)]


Body = TypeVar("Body", bound=Strict)


def parse(body: bytes, model: type[Body], most_messages: int) -> Body:
    """The body of a request.

    Args:
        most_messages: the most messages and parts of messages that are looked at.

    Raises:
        ApiError: 400, with the first thing that is wrong.
    """
    gc.disable()  # millions of lists that come at once are not garbage: looking for it stops all threads
    try:
        # Its depth is bounded, other than that of Python's own parser; NaN is not JSON.
        values: JsonValue = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from None
    finally:
        gc.enable()
    if not isinstance(values, dict):
        raise ApiError(400, f"The body is {shown(values)}. Valid: a JSON object.")
    messages = values.get("messages")
    if isinstance(messages, list):
        turns = [message for message in messages if isinstance(message, dict)]
        lists = [turn.get(name) for turn in turns for name in ("content", "tool_calls")]
        count = len(messages) + sum(len(one) for one in lists if isinstance(one, list))
        if count > most_messages:
            raise ApiError(
                400,
                f"The conversation has {count} messages and parts, more than the context has tokens: "
                f"{most_messages}. Try a shorter one.",
                param="messages",
                code="context_length_exceeded",
            )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _first(error, model) from None


def _first(error: ValidationError, model: type[Strict]) -> ApiError:
    details = error.errors(include_url=False)[0]
    path = ""
    for step in details["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not path or step not in KINDS:
            path += f".{step}" if path else step
    message = "Valid: a JSON object" if details["type"] == "model_type" else details["msg"]
    if details["type"] == "missing":
        text = f"{path} is required."
    elif not path:
        path = details["type"] if details["type"] in model.model_fields else ""
        path = details.get("ctx", {}).get("field", path)
        text = message if message.endswith("?") else f"{message}."
    else:
        value = details["input"]
        text = (
            f"{path}: {message}"
            if isinstance(value, dict)
            else f"{path} is {shown(value)}. {message}"
        )
        text = text if text.endswith((".", "?")) else f"{text}."
    return ApiError(400, text, param=path or None)
