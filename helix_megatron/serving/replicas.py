"""Which replica answers a request: the one that its beginning belongs to, unless that one has more to do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

BEGINNING = 1024  # characters of a prompt that say where it belongs
MORE_TO_DO = 4  # requests by which the replica with a beginning may be ahead of the least busy one


@dataclass(eq=False)
class Replica:
    """A server on this machine with ranks of its own.

    Args:
        number: from 0.
        port: where it listens, on the loopback address.
        trouble: why it takes no requests; empty while it does.
        open: how many requests it answers now.
        answered, lost: how many it has answered, and how many ended because it was gone.
        restarts: how often it was started again.
    """

    number: int
    port: int
    trouble: str = "it has not started yet."
    open: int = 0
    answered: int = 0
    lost: int = 0
    restarts: int = 0


@dataclass(frozen=True)
class Replicas:
    """All replicas of a server, the dead ones too."""

    all: Sequence[Replica] = field(default_factory=list)

    def able(self) -> list[Replica]:
        """Those that take requests."""
        return [replica for replica in self.all if not replica.trouble]

    def for_request(self, beginning: bytes) -> list[Replica]:
        """The replicas that take requests, the one that should answer first, then those to try after it.

        Args:
            beginning: of the prompt. Equal ones go to the same replica, which keeps their keys and values; when
                a replica is gone, only its own go elsewhere.
        """
        able = self.able()
        ranked = sorted(able, key=lambda replica: _weight(beginning, replica), reverse=True)
        if not ranked:
            return []
        least = min(replica.open for replica in ranked)
        near = [replica for replica in ranked if replica.open <= least + MORE_TO_DO]
        return near + [replica for replica in ranked if replica not in near]


def _weight(beginning: bytes, replica: Replica) -> bytes:
    return hashlib.blake2b(beginning, digest_size=8, salt=bytes([replica.number % 256])).digest()


def beginning_of(body: bytes) -> bytes:
    """What the prompt of a request begins with; of a body that is none, what the body begins with."""
    try:
        values: Any = from_json(body, allow_inf_nan=False)
        prompt = values.get("messages") or values.get("prompt")
        while isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            prompt = prompt[0]  # of several prompts the first
        return str(prompt)[:BEGINNING].encode(errors="replace")
    except (ValueError, AttributeError):
        return body[:BEGINNING]
