"""From a client's request to what the engine is asked: tokens, sampling, lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from helix_megatron.inference.answers import AnswerParser
from helix_megatron.inference.request import MAX_SEED, Capacity, Constraint, Sampling
from helix_megatron.serving.api_errors import ApiError, shown
from helix_megatron.serving.generation import Plan
from helix_megatron.serving.schema import ChatRequest, CompletionRequest, GenerationRequest
from helix_megatron.serving.settings import ServerSettings

COMPLETION_TOKENS = (
    16  # OpenAI's default of max_tokens; chat goes on as long as the context permits
)


# Tokens of English have 4 characters on average, long runs of spaces up to 16; longer texts do not fit.
CHARACTERS_PER_TOKEN = 16


def check(request: GenerationRequest, capacity: Capacity, settings: ServerSettings) -> None:
    """Refuse what can be refused before a text is tokenised.

    Raises:
        ApiError: 400 or 404.
    """
    require_model(request.model, settings)
    choices = request.choices
    param = "n" if choices == (request.n or 1) else "best_of"
    _at_most(param, choices, settings.max_choices, "Try several requests.")
    for token in request.logit_bias or ():
        if int(token) >= capacity.vocab_size:
            raise ApiError(
                400,
                f"logit_bias has token {token}. Valid tokens: 0 to {capacity.vocab_size - 1}.",
                param="logit_bias",
            )
    if not isinstance(request, CompletionRequest):
        return
    wanted = request.prompts
    _at_most("prompt", len(wanted), settings.max_prompts, "Try several requests.", "prompts")
    _at_most(
        param,
        choices * len(wanted),
        capacity.max_sequences + capacity.max_waiting,
        "That is what the engine generates and queues at once. Try several requests.",
        "sequences",
    )
    for one in wanted:
        if isinstance(one, str):
            check_size(len(one), capacity, "prompt")


def check_size(characters: int, capacity: Capacity, param: str) -> None:
    """Refuse a text that cannot fit: finding out how many tokens it has would take all others' time.

    Raises:
        ApiError: 400.
    """
    limit = CHARACTERS_PER_TOKEN * capacity.max_context
    if characters > limit:
        raise ApiError(
            400,
            f"The prompt has {characters} characters. The context holds {capacity.max_context} tokens, and "
            f"texts of more than {limit} characters are not tried. Try a shorter prompt.",
            param=param,
            code="context_length_exceeded",
        )


def plan(
    request: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    stop_tokens: frozenset[int],
    capacity: Capacity,
    echoes: Sequence[str] = (),
    constraint: Callable[[], Constraint] | None = None,
    answers: Callable[[], AnswerParser] | None = None,
) -> Plan:
    """What the engine is asked for these prompts.

    Args:
        echoes: the texts of the prompts, where the choices begin with them.
        constraint: what makes a constraint for each choice.
        answers: what makes a parser of each choice, where they may call tools.

    Raises:
        ApiError: 400.
    """
    chat = isinstance(request, ChatRequest)
    param, default = ("messages", capacity.max_context) if chat else ("prompt", COMPLETION_TOKENS)
    samplings = []
    for prompt in prompts:
        length = _length(len(prompt), request.length, default, capacity.max_context, param)
        samplings.append(_samplings(request, length, stop_tokens))
    return Plan(
        tuple(map(tuple, prompts)),
        tuple(samplings),
        tuple(request.stops),
        echoes=tuple(echoes),
        returned=request.n or 1,
        logprobs=request.alternatives is not None,
        constraint=constraint,
        answers=answers,
        one_call=isinstance(request, ChatRequest) and request.parallel_tool_calls is False,
    )


def require_model(name: str, settings: ServerSettings) -> None:
    """There is one model, and clients must mean it.

    Raises:
        ApiError: 404.
    """
    if name != settings.model_name:
        raise ApiError(
            404,
            f"There is no model {shown(name)}. Valid: {settings.model_name}.",
            param="model",
            code="model_not_found",
        )


def _length(prompt: int, wanted: int | None, default: int, context: int, param: str) -> int:
    """max_tokens: what the client wants, or the default as far as there is room."""
    room = context - prompt
    if room < 1 or (wanted is not None and wanted > room):
        more = f" and max_tokens is {wanted}, together {prompt + wanted}" if wanted else ""
        hint = f"max_tokens up to {room}, or a shorter prompt" if room > 0 else "a shorter prompt"
        raise ApiError(
            400,
            f"The prompt has {prompt} tokens{more}. The context holds {context}, at least one of them "
            f"generated. Try {hint}.",
            param=param,
            code="context_length_exceeded",
        )
    return min(default, room) if wanted is None else wanted


def _samplings(
    request: GenerationRequest, length: int, stop_tokens: frozenset[int]
) -> tuple[Sampling, ...]:
    """One of each choice. With a seed each has another, or all would be the same text."""
    logprobs = request.alternatives
    if logprobs is None and request.choices > (request.n or 1):
        logprobs = 0  # they tell which are the best
    echo = isinstance(request, CompletionRequest) and request.echo
    bias = tuple(sorted((int(token), value) for token, value in (request.logit_bias or {}).items()))
    return tuple(
        Sampling(
            max_tokens=length,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=max(request.top_k or 0, 0),
            top_p=1.0 if request.top_p is None else request.top_p,
            min_p=request.min_p or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=request.repetition_penalty or 1.0,
            logit_bias=bias,
            logprobs=logprobs,
            prompt_logprobs=request.alternatives if echo else None,
            seed=None if request.seed is None else (request.seed + choice) & MAX_SEED,
            stop_tokens=frozenset() if request.ignore_eos else stop_tokens,
        )
        for choice in range(request.choices)
    )


def _at_most(param: str, value: int, limit: int, hint: str, unit: str = "choices") -> None:
    if value > limit:
        raise ApiError(
            400, f"The request has {value} {unit}. Valid: up to {limit}. {hint}", param=param
        )
