"""What all bodies of requests have in common: strict types, and no field that is not known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import JsonDict
from pydantic_core import PydanticCustomError

from helix_megatron.serving import fields

LARGEST_TOKEN = 2**31 - 1


def _publish(schema: JsonDict, model: type[Any]) -> None:
    """The fields that `fields.complaint` checks are a part of the published schema."""
    properties = schema["properties"]
    assert isinstance(properties, dict)
    properties.update(fields.published(model.neutral, model.ignored))  # type: ignore[arg-type]
    schema["additionalProperties"] = False


class Strict(BaseModel):
    """No conversions: "1" is not 1, and true is not 1; but 16.0 is 16, as in JSON Schema."""

    model_config = ConfigDict(strict=True, extra="ignore", json_schema_extra=_publish)
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _no_other_fields(cls, values: Any) -> Any:
        """Before the types: who misspells a required field must not only hear that it is missing."""
        if not isinstance(values, dict):
            return values
        found = fields.complaint(cls.model_fields, values, cls.neutral, cls.ignored)
        if found:
            details = {"field": found[0][:80], "message": found[1].removesuffix(".")}
            raise PydanticCustomError("unsupported", "{message}", details)
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in values.items()
        }


def kind(value: object) -> str | None:
    """Which of the union's types a value means, by its first element: only that one is validated."""
    if isinstance(value, list):
        first = value[0] if value else None
        kinds = {str: "strings", int: "tokens", list: "token lists", dict: "parts"}
        return kinds.get(type(first))
    return "string" if isinstance(value, str) else None


KINDS = frozenset(
    {"string", "strings", "tokens", "token lists", "parts", "[key]"}
)  # not fields inside of one

Token = Annotated[int, Field(ge=0, le=LARGEST_TOKEN)]
TokenList = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
