"""What an operator of the server decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.flags import check_values, setting

MOST_SECONDS = 10**7  # four months, which every clock can count


def _seconds(help_text: str) -> Any:
    return setting(60.0, help_text, above=0, at_most=MOST_SECONDS)


@dataclass(frozen=True)
class ServerSettings:
    """How the server answers.

    `model_name` is what clients ask for, and what `/v1/models` lists. One of `api_keys` must come as
    `Authorization: Bearer KEY`; without any, no key is asked for. The other fields' help texts are those of the
    flags; a body that is too long is refused before it is parsed, and who is slow is cut off.

    Raises:
        HelixError: a value out of range, with the valid ones.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    host: str = setting("127.0.0.1", "the address to listen at")
    port: int = setting(
        8000, "the port to listen at; 0 takes a free one", at_least=0, at_most=65535
    )
    max_waiting: int = setting(
        256,
        "how many sequences may wait for their turn; one more is refused with 429",
        at_least=0,
        at_most=2**31 - 1,
    )
    drain_seconds: float = setting(
        30.0,
        "the time that open requests have to finish after SIGTERM or Ctrl-C",
        at_most=MOST_SECONDS,
    )
    protect_metrics: bool = setting(
        False, "ask for a key at /metrics, too; /health never asks for one"
    )
    max_body_bytes: int = setting(8 * 1024 * 1024, "the longest body of a request")
    max_bodies_bytes: int = setting(
        256 * 1024 * 1024,
        "the most bytes of bodies that are read or turned into tokens at the same time; a request beyond it "
        "must come later",
    )
    body_seconds: float = _seconds("the time in which a request's body must have come")
    send_seconds: float = _seconds("the time in which a client must take an event of its stream")
    max_choices: int = setting(16, "the largest n of a request")
    max_prompts: int = setting(64, "the most prompts in the list of a request")
    max_open_requests: int = setting(
        1024, "how many requests are read or answered at the same time; one more must come later"
    )

    def __post_init__(self) -> None:
        check_values(self)
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
