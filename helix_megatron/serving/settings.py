"""What an operator of the server decides."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from helix_megatron.errors import HelixError


@dataclass(frozen=True)
class ServerSettings:
    """How the server answers.

    Args:
        model_name: that clients ask for, and that `/v1/models` lists.
        api_keys: one of them must come as `Authorization: Bearer KEY`; none asks for no key.
        protect_metrics: ask for a key at `/metrics`, too. `/health` never asks.
        max_body_bytes: of one request's body; a longer one is refused before it is parsed.
        body_seconds: in which a body must have arrived.
        send_seconds: in which a client must take an event of its stream; a slower one is cut off.
        max_choices: `n` of one request, at most.
        max_prompts: in the list of one request, at most.
        max_open_requests: that are answered or read at the same time; one more is told to come later.

    Raises:
        HelixError: a value out of range, with the valid ones.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    protect_metrics: bool = False
    max_body_bytes: int = 8 * 1024 * 1024
    body_seconds: float = 60.0
    send_seconds: float = 60.0
    max_choices: int = 16
    max_prompts: int = 64
    max_open_requests: int = 1024

    def __post_init__(self) -> None:
        if not self.model_name.strip():
            raise HelixError("model_name is empty. Valid: the name that clients ask for.")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                # The key itself must not appear in a log.
                raise HelixError(
                    f"An API key of {len(key)} characters cannot be sent in a header. Valid: one or more "
                    "printable ASCII characters, no spaces. Try: openssl rand -hex 32."
                )
        if self.protect_metrics and not self.api_keys:
            raise HelixError("protect_metrics asks for an API key, and there is none. Add one.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and value < 1:
                raise HelixError(f"{field.name} is {value}. Valid: at least 1.")
            if field.name.endswith("_seconds") and not (math.isfinite(value) and value > 0):
                raise HelixError(f"{field.name} is {value}. Valid: more than 0.")
