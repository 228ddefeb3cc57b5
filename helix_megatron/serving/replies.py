"""What the server answers: the same models are sent, and published in the OpenAPI schema."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

Value = TypeVar("Value")
# OpenAI leaves these fields out, and not all clients take null for that.
Omitted = Annotated[Value | None, Field(exclude_if=lambda value: value is None)]
Finish = Literal["stop", "length", "tool_calls"]


class ErrorDetail(BaseModel):
    """What is wrong, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every response that is not a success."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """How many of the prompts' tokens were not computed, since earlier ones began alike."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts together; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenAlternative(BaseModel):
    """A token in a chat's answer. `bytes` are those of its text in UTF-8, where they are known."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenEntry(TokenAlternative):
    """A token that was chosen, and the likeliest ones in its place."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(BaseModel):
    """Of the tokens of an answer, or of an event."""

    content: list[TokenEntry]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Of the tokens of a text, or of an event. The first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _Response(BaseModel):
    """What all responses and their events have in common."""

    id: str
    created: int
    model: str


class CompletionChoice(BaseModel):
    """One text of a response or an event."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None


class CompletionReply(_Response):
    """The answer of `/v1/completions`."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage


class FunctionCall(BaseModel):
    """The function that the model calls, and JSON with its arguments, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool, whose result the client may send with its `id`."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ToolCallDelta(ToolCall):
    """A call in a stream, which comes whole. `index` is its number in the answer."""

    index: int


class ChatMessage(BaseModel):
    """The assistant's answer. Reasoning is told apart in answers to requests with tools."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: Omitted[str] = None
    tool_calls: Omitted[list[ToolCall]] = None


class ChatChoice(BaseModel):
    """One of the answers to a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish


class ChatReply(_Response):
    """The answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """What is known of a model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "helix"
    max_model_len: int


class ModelList(BaseModel):
    """The answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeReply(BaseModel):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Omitted[list[str]] = None


class DetokenizeReply(BaseModel):
    """The answer of `/detokenize`."""

    prompt: str


class Health(BaseModel):
    """The answer of `/health` while requests are taken; `degraded` says which ones fail."""

    status: Literal["ok", "degraded"] = "ok"
    reason: Omitted[str] = None


class CompletionChunk(_Response):
    """One event of a streamed completion. The last has no choices, and the usage if it was asked for."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Omitted[Usage] = None


class ChatDelta(BaseModel):
    """What an event adds to an answer; the role comes first, alone."""

    role: Omitted[Literal["assistant"]] = None
    content: Omitted[str] = None
    reasoning_content: Omitted[str] = None
    tool_calls: Omitted[list[ToolCallDelta]] = None


class ChatChunkChoice(BaseModel):
    """What is new of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None


class ChatChunk(_Response):
    """One event of a streamed answer. The last has no choices, and the usage if it was asked for."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Omitted[Usage] = None
