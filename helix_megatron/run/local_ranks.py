"""Start the ranks of a command on this machine, pass on signals, and end when they end.

torchrun would do to start them, but it ends a command that was asked to stop with a traceback, and it kills
rank 0 at once when another rank dies: a server must tell its clients first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

POLL_SECONDS = 0.05
# For the other ranks to end by themselves when one has ended; a busy machine needs more than a moment.
FAREWELL_SECONDS = 60.0
# The same where one failed that was asked to end, or that has told the user what to put right.
ASKED_SECONDS = 2.0
USER_ERROR = 2
PARENT = "HELIX_PARENT_PIPE"
LOOPBACK = "lo"  # for gloo, where it exists: a host's name need not resolve


class Rank(Protocol):
    """A process that runs one rank, the first of a process group of its own; `subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free TCP port of this machine, which no other program is given inside the block.

    It is bound and not listened to: who is told of it can listen there with SO_REUSEADDR, as torch's stores do.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def start_ranks(number: int, command: Sequence[str], *, drains: bool = False) -> int:
    """Run a command on ranks 0 to `number` − 1 of this machine; its exit status.

    Ranks get torchrun's environment variables. Rank 0 has this process's standard input and output. SIGTERM
    goes to rank 0, whose status is then that of all; a second one kills all. Ranks end when this process is
    gone.

    Args:
        drains: the command ends by itself on SIGTERM, and Ctrl-C asks it to. Otherwise Ctrl-C ends the ranks.

    Raises:
        KeyboardInterrupt: Ctrl-C has ended the ranks.
    """
    listening, writing = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with reserved_port() as port, supervised(processes, drains=drains) as asked:
            environment = rank_environment(number, port) | {PARENT: str(listening)}
            for rank in range(number):
                if asked:
                    break
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=None if rank == 0 else subprocess.DEVNULL,
                        pass_fds=(listening,),
                        start_new_session=True,  # a terminal's Ctrl-C comes here only
                    )
                )
            status = wait_for(processes, asked)
            return 128 + asked[0] if asked and status else status
    finally:
        os.close(listening)
        os.close(writing)


@contextlib.contextmanager
def supervised(ranks: Sequence[Rank], *, drains: bool = False) -> Iterator[list[int]]:
    """Pass signals on to the ranks inside the block, and leave none of them behind.

    Yields:
        The signals that have asked the ranks to end.

    Raises:
        KeyboardInterrupt: Ctrl-C, unless the ranks end by themselves (`drains`).
    """
    asked: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        asked.append(signum)
        if signum == signal.SIGINT and not drains:
            raise KeyboardInterrupt
        if len(asked) > 1:
            _kill(ranks)
        elif ranks:
            _send(signal.SIGTERM, ranks[0])
            _wake(ranks)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave ranks behind
        _kill(ranks)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_with_parent(farewell: Callable[[], None] = lambda: None) -> None:
    """In a rank: end this process when the one that started it is gone. Does nothing elsewhere.

    Args:
        farewell: called before, from another thread; it must not take longer than a few seconds.
    """
    number = os.environ.pop(PARENT, None)
    if number is None:
        return

    def watch(descriptor: int) -> None:
        os.read(descriptor, 1)  # the parent never writes: this is its end
        with contextlib.suppress(Exception):
            farewell()
        os._exit(1)

    threading.Thread(target=watch, args=(int(number),), name="helix-parent", daemon=True).start()


def rank_environment(number: int, port: int) -> dict[str, str]:
    """The environment of `number` ranks of this machine that meet at a port, without the rank itself."""
    environment = dict(os.environ)
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number)),
    }
    if LOOPBACK in (name for _, name in socket.if_nameindex()):
        defaults["GLOO_SOCKET_IFNAME"] = LOOPBACK
    return (
        defaults
        | environment
        | {
            "WORLD_SIZE": str(number),
            "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )


def wait_for(ranks: Sequence[Rank], asked: Sequence[int] = ()) -> int:
    """Wait until all have ended; where one failed, the others have a while to end by themselves.

    Returns:
        0 if all ended well, or rank 0 when it was asked to end; else the status of the first rank that failed.
    """
    deadline = None
    while True:
        statuses = [rank.poll() for rank in ranks]
        if all(status is not None for status in statuses):
            break
        failed = any(status not in (None, 0) for status in statuses)
        if deadline is None and (failed or statuses[0] == 0):
            _wake(ranks)
            soon = asked or (failed and USER_ERROR in statuses)
            deadline = time.monotonic() + (ASKED_SECONDS if soon else FAREWELL_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    for number, status in enumerate(statuses):
        if status is not None and status < 0 and not asked:  # not by this process
            name = signal.Signals(-status).name
            print(f"rank {number} was ended by {name}", file=sys.stderr, flush=True)
    if statuses and all(status == 0 for status in statuses[: 1 if asked else None]):
        return 0
    return next((status for status in statuses if status is not None and status > 0), 1)


def _wake(ranks: Sequence[Rank]) -> None:
    """A rank that is stopped hears of nothing, and would neither end nor notice that others have."""
    for rank in ranks:
        if rank.poll() is None:
            _send(signal.SIGCONT, rank)


def _send(signum: int, rank: Rank) -> None:
    """Nothing where a rank has just ended: the number of one that is no child of ours is free at once."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank.pid, signum)


def _kill(ranks: Sequence[Rank]) -> None:
    """End the ranks and what they have started, and wait for their ends."""
    for rank in ranks:
        if rank.poll() is None:
            _send(signal.SIGKILL, rank)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
    for rank in ranks:
        while rank.poll() is None:
            time.sleep(POLL_SECONDS)
