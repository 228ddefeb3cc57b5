"""What an operator of the server decides."""

from __future__ import annotations

from dataclasses import dataclass, fields

from helix_megatron.errors import HelixError

MOST_SECONDS = 10**7  # four months, which every clock can count


@dataclass(frozen=True)
class ServerSettings:
    """How the server answers.

    Args:
        model_name: what clients ask for, and what `/v1/models` lists.
        api_keys: one of them must come as `Authorization: Bearer KEY`; without any, no key is asked for.
        protect_metrics: whether `/metrics` asks for a key, too. `/health` never does.
        max_body_bytes: the longest body of a request; a longer one is refused before it is parsed.
        body_seconds: the time in which a body must have arrived.
        send_seconds: the time in which a client must take an event of its stream; a slower one is cut off.
        max_choices: the largest `n` of a request.
        max_prompts: the most prompts in the list of a request.
        max_open_requests: how many are read or answered at the same time; one more is told to come later.

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
        name = self.model_name
        if not name.strip() or not name.isprintable() or name != name.strip("/ "):
            raise HelixError(
                f"model_name is {name!r}. Valid: the name that clients ask for, of printable characters, with "
                "no space or slash around it. Give --model-name."
            )
        for key in self.api_keys:
            sendable = key.isascii() and key.isprintable() and " " not in key
            if not sendable or not any(map(str.isalnum, key)):
                # The key itself must not appear in a log.
                raise HelixError(
                    f"An API key of {len(key)} characters is none that a client can send. Valid: printable "
                    "ASCII characters, letters or digits among them, no spaces. Try: openssl rand -hex 32."
                )
        if self.protect_metrics and not self.api_keys:
            raise HelixError("protect_metrics asks for an API key, and there is none. Add one.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and value < 1:
                raise HelixError(f"{field.name} is {value}. Valid: at least 1.")
            if field.name.endswith("_seconds") and not 0 < value <= MOST_SECONDS:
                raise HelixError(
                    f"{field.name} is {value}. Valid: more than 0, up to {MOST_SECONDS}."
                )
