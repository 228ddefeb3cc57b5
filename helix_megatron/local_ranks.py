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
from collections.abc import Callable, Sequence

POLL_SECONDS = 0.05
# For the other ranks to end by themselves when one has ended; a busy machine needs more than a moment.
FAREWELL_SECONDS = 60.0
# The same where one failed that was asked to end, or that has told the user what to put right.
ASKED_SECONDS = 2.0
USER_ERROR = 2
PARENT = "HELIX_PARENT_PIPE"
LOOPBACK = "lo"  # for gloo, where it exists: a host's name need not resolve


def free_port() -> int:
    """A TCP port of this machine that nobody listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def has_loopback() -> bool:
    """Whether the interface `LOOPBACK` exists."""
    return LOOPBACK in (name for _, name in socket.if_nameindex())


def start_ranks(number: int, command: Sequence[str]) -> int:
    """Run a command on ranks 0 to `number` − 1 of this machine; its exit status.

    Ranks get torchrun's environment variables. Rank 0 has this process's standard input and output. SIGINT and
    SIGTERM go to rank 0 as SIGTERM, and its status is then that of all; a second one kills all. Ranks end when
    this process is gone.
    """
    listening, writing = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []
    before = {}

    def pass_on(signum: int, frame: object) -> None:
        asked.append(signum)
        if len(asked) > 1:
            _kill(processes)
        elif processes:
            processes[0].send_signal(signal.SIGTERM)
            _wake(processes)

    for signum in (signal.SIGINT, signal.SIGTERM):
        before[signum] = signal.signal(signum, pass_on)
    try:
        environment = _environment(number) | {PARENT: str(listening)}
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
        status = _wait(processes, asked)
        return 128 + asked[0] if asked and status else status
    finally:
        _kill(processes)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(listening)
        os.close(writing)


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


def _environment(number: int) -> dict[str, str]:
    environment = dict(os.environ)
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number)),
        "TORCHDYNAMO_DISABLE": "1",
    }
    if has_loopback():
        defaults["GLOO_SOCKET_IFNAME"] = LOOPBACK
    for name, value in defaults.items():
        environment.setdefault(name, value)
    return environment | {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def _wait(processes: list[subprocess.Popen[bytes]], asked: list[int]) -> int:
    """Until all have ended; where one failed, the others have a while to end by themselves."""
    deadline = None
    while True:
        statuses = [process.poll() for process in processes]
        if all(status is not None for status in statuses):
            break
        failed = any(status not in (None, 0) for status in statuses)
        if deadline is None and (failed or statuses[0] == 0):
            _wake(processes)
            soon = asked or (failed and USER_ERROR in statuses)
            deadline = time.monotonic() + (ASKED_SECONDS if soon else FAREWELL_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            _kill(processes)
            break
        time.sleep(POLL_SECONDS)
    for rank, status in enumerate(statuses):
        if status is not None and status < 0 and not asked:  # not by this process
            name = signal.Signals(-status).name
            print(f"rank {rank} was ended by {name}", file=sys.stderr, flush=True)
    codes = [process.wait() for process in processes]
    if all(code == 0 for code in codes) or (asked and codes[0] == 0):
        return 0 if processes else 1
    return next((status for status in statuses if status is not None and status > 0), 1)


def _wake(processes: list[subprocess.Popen[bytes]]) -> None:
    """A rank that is stopped hears of nothing, and would neither end nor notice that others have."""
    for process in processes:
        process.send_signal(signal.SIGCONT)  # sends nothing to one that has ended


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
