"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, always."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from helix_megatron.errors import HelixError
from helix_megatron.inference.request import QueueFullError, StoppingError
from helix_megatron.serving.replies import ErrorDetail, ErrorReply

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1
# What nginx logs when nobody waits for the answer any more; it is counted and never sent.
CLIENT_CLOSED_REQUEST = 499

EXPLANATIONS = {
    400: "The request is malformed, or asks for what is not supported.",
    401: "The API key is missing or wrong.",
    404: "There is no such path or model.",
    405: "The path does not have this method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    429: "Too many requests wait. `Retry-After` says when to try again.",
    500: "The engine failed.",
    503: "The server is stopping, or its engine has failed.",
}


class ApiError(Exception):
    """An answer that is not a success.

    Args:
        status: the status of HTTP.
        message: what people read: the value, the valid values, what to try.
        param: the field of the request that is wrong.
        code: what programs read, where OpenAI has a code for it.
        headers: headers of the response, beyond the usual.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """Which of OpenAI's families the error belongs to."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        server = self.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return "server_error" if server else "invalid_request_error"

    def reply(self) -> ErrorReply:
        return ErrorReply(
            error=ErrorDetail(
                message=self.message, type=self.type, param=self.param, code=self.code
            )
        )

    def response(self) -> Response:
        return Response(
            encoded(self.reply()), self.status, self.headers, media_type="application/json"
        )


def encoded(reply: Any) -> bytes:
    """A pydantic model as JSON. Half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    try:
        return reply.model_dump_json().encode()
    except ValueError:
        import json

        text = json.dumps(reply.model_dump(), ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def from_engine(error: HelixError, failure: str) -> ApiError:
    """What the engine's (or the tokeniser's) refusal means to a client.

    Args:
        failure: why the engine failed; empty while it runs well.
    """
    if isinstance(error, QueueFullError):
        return too_many(str(error))
    if isinstance(error, StoppingError):
        return unavailable(failure or str(error))
    return ApiError(400, str(error))


def too_many(message: str) -> ApiError:
    """The answer 429, which says when to try again."""
    return ApiError(
        429, message, code="rate_limit_exceeded", headers={"Retry-After": str(RETRY_SECONDS)}
    )


def unavailable(reason: str) -> ApiError:
    """The answer 503: this server takes no requests any more."""
    return ApiError(503, f"The server takes no requests: {reason}", code="service_unavailable")


def mistake() -> ApiError:
    """The answer 500 to what should not happen. What it was stands in the log and is not for clients."""
    return ApiError(500, "The server made a mistake; its log says more.")


def shown(value: object, limit: int = 80) -> str:
    """A client's value in a message, not longer than `limit` characters."""
    text = repr(value[:limit]) if isinstance(value, str | list) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def install_error_handlers(app: FastAPI) -> None:
    """Whatever is raised before a response began becomes an `ErrorReply`."""

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = shown(request.url.path)
        message = str(error.detail)
        if error.status_code == HTTPStatus.NOT_FOUND:
            message = f"There is no path {path}. Valid: see /openapi.json."
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            valid = (error.headers or {}).get("Allow", "see /openapi.json")
            message = f"{path} does not have method {shown(request.method)}. Valid: {valid}."
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def disconnected(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def unexpected(_: Request, __: Exception) -> Response:
        # Starlette raises the exception again, for the log.
        return mistake().response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, disconnected)
    app.add_exception_handler(Exception, unexpected)
