"""OpenAI's fields that are not implemented: ignored, refused unless neutral, or unknown."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping

# They say who asks and how it is billed, cached or kept, and do not change the text.
IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Field → the values, beside null, with which it changes nothing. Others would change the text, and are refused.
NEUTRAL_COMPLETION: dict[str, tuple[object, ...]] = {"suffix": ("",)}
NEUTRAL_CHAT: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "verbosity": (),
    "web_search_options": (),
}
# Arguments of a call are what the model writes, held to no schema.
NEUTRAL_FUNCTION: dict[str, tuple[object, ...]] = {"strict": (False,)}
# Clients send an assistant's answer back as they received it, with what other servers and libraries add to it.
NEUTRAL_MESSAGE: dict[str, tuple[object, ...]] = {"audio": (), "function_call": ()}
IGNORED_OF_MESSAGE = frozenset(
    {
        "annotations",
        "images",
        "provider_specific_fields",
        "reasoning",
        "reasoning_details",
        "refusal",
        "thinking_blocks",
    }
)
NEUTRAL_PART: dict[str, tuple[object, ...]] = dict.fromkeys(
    ("file", "image_url", "input_audio", "refusal", "video_url"), ()
)
IGNORED_OF_PART = frozenset({"annotations", "cache_control"})


def same(left: object, right: object) -> bool:
    """Equal as JSON: true is not 1, and 0 is 0.0."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def complaint(
    names: Iterable[str],
    values: Mapping[str, object],
    neutral: Mapping[str, tuple[object, ...]],
    ignored: frozenset[str] = frozenset(),
) -> tuple[str, str] | None:
    """The first field of `values` that cannot be served, and why; None if all can."""
    names = set(names)
    for name, value in values.items():
        if name in names or name in ignored:
            continue
        if name in neutral:
            if value is None or any(same(value, other) for other in neutral[name]):
                continue
            valid = ", ".join(json.dumps(other) for other in (*neutral[name], None))
            return name, f"{name[:80]} is not supported. Valid: leave it out, or {valid}."
        close = difflib.get_close_matches(name[:80], [*names, *neutral, *ignored], n=3)
        hint = (
            f"Did you mean {', '.join(close)}?" if close else f"Valid: {', '.join(sorted(names))}."
        )
        return name, f"Unknown field {name[:80]!r}. {hint}"
    return None


def published(
    neutral: Mapping[str, tuple[object, ...]], ignored: frozenset[str]
) -> dict[str, object]:
    """JSON Schemas of these fields: field → schema."""
    schemas: dict[str, object] = {
        name: {
            "enum": [*values, None],
            "description": "Not supported: accepted with a value that changes nothing.",
        }
        for name, values in neutral.items()
    }
    schemas |= {name: {"description": "Accepted and ignored."} for name in sorted(ignored)}
    return schemas
