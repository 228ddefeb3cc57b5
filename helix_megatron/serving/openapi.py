"""The published schema: what FastAPI derives, and the bodies and errors that the server handles itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from helix_megatron import __version__
from helix_megatron.serving.api_errors import EXPLANATIONS
from helix_megatron.serving.replies import ErrorReply

REFERENCE = "#/components/schemas/{model}"


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for these errors."""
    headers = {
        401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
        429: {"Retry-After": {"schema": {"type": "integer"}, "description": "In seconds."}},
    }
    return {
        status: {"model": ErrorReply, "description": EXPLANATIONS[status]}
        | ({"headers": headers[status]} if status in headers else {})
        for status in statuses
    }


def streamed(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers whole, or with `stream` in events."""
    data = {"type": "string", "description": "A part of the answer in JSON; at last, [DONE]."}
    # Before OpenAPI 3.2 the schema of a stream of events is that of each event.
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    events = {"schema": event, "example": "data: {…}\n\ndata: [DONE]\n\n"}
    return {
        200: {
            "model": model,
            "description": "The answer; with `stream`, server-sent events.",
            "content": {"text/event-stream": events},
        }
    }


def plain_text() -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers in plain text."""
    return {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that parses its body itself."""
    schema = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def publish(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Publish these bodies' schemas, too, and no response that cannot happen."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=__version__,
                description="Generation on more ranks than there are key-value heads, as OpenAI's API.",
                routes=app.routes,
            )
            _, definitions = models_json_schema(
                [(body, "validation") for body in bodies], ref_template=REFERENCE
            )
            schemas = document["components"]["schemas"]
            schemas |= definitions["$defs"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for path in document["paths"].values():
                for operation in path.values():
                    # FastAPI adds it to whatever has parameters; here a wrong value is a 400.
                    operation["responses"].pop("422", None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]
