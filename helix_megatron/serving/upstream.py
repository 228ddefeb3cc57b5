"""What `helix serve` takes from uvicorn besides its documented interface, and whether it is there."""

from __future__ import annotations

from importlib.util import find_spec

from helix_megatron.needs import Need, unmet

NEEDS = (
    Need(
        "uvicorn.protocols.http.h11_impl:H11Protocol.connection_made",
        "connections that send no header cannot be closed",
        ("transport",),
    ),
    Need(
        "uvicorn.protocols.http.h11_impl:H11Protocol.connection_lost",
        "connections that send no header cannot be closed",
        ("exc",),
    ),
    Need(
        "uvicorn.protocols.http.h11_impl:H11Protocol.on_response_complete",
        "connections that send no second header cannot be closed",
    ),
    Need("uvicorn:Server.serve", "the server cannot use a socket of its own", ("sockets",)),
)


def check() -> list[str]:
    """What `helix serve` needs and the installed uvicorn has not, in sentences; none without uvicorn."""
    return [] if find_spec("uvicorn") is None else unmet("uvicorn", NEEDS)
