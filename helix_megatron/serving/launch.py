"""Starting replicas of the server on this machine, and the endpoint in front of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from helix_megatron.errors import HelixError, counted
from helix_megatron.inference.command import say
from helix_megatron.run.local_ranks import PARENT, reserved_port
from helix_megatron.serving.front import make_front
from helix_megatron.serving.relay import HOST
from helix_megatron.serving.replicas import Replica, Replicas
from helix_megatron.serving.server import Server, allow_many_connections, listen
from helix_megatron.serving.settings import ServerSettings

POLL_SECONDS, ANSWER_SECONDS = 0.5, 5.0
LONGEST_PAUSE = 60.0  # before a replica is started again that ends again and again
GRACE_SECONDS = 10.0  # for replicas to end after they have drained
GPUS = "CUDA_VISIBLE_DEVICES"
Process = subprocess.Popen[str]


def serve_replicas(
    settings: ServerSettings, arguments: Sequence[str], replicas: int, ranks: int
) -> int:
    """Serve until a signal, or until no replica works or will be started again; return the exit status.

    Args:
        arguments: of `helix serve`, as they were given.
        replicas: how many servers are started.
        ranks: of each.

    Raises:
        HelixError: ranks of a launcher, which cannot start replicas; or too few GPUs for all of them.
    """
    if "RANK" in os.environ:
        raise HelixError(
            "--data-parallel-size starts replicas on this machine, and a launcher has started ranks already. "
            "Leave out the launcher, and give --nproc-per-node."
        )
    gpus = _gpus()
    if gpus and len(gpus) < replicas * ranks:
        raise HelixError(
            f"{counted(replicas, 'replica')} of {counted(ranks, 'rank')} need {replicas * ranks} GPUs, and "
            f"{len(gpus)} are visible. Give --data-parallel-size up to {len(gpus) // ranks}, or fewer ranks."
        )
    allow_many_connections()
    listener = listen(settings.host, settings.port)
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    held = contextlib.ExitStack()
    ports = [held.enter_context(reserved_port()) for _ in range(replicas)]
    state = Replicas([Replica(number, port) for number, port in enumerate(ports)])
    listening, writing = os.pipe()  # it closes with this process, and the replicas end

    def start(replica: Replica) -> Process:
        first = replica.number * ranks
        own = {GPUS: ",".join(gpus[first : first + ranks])} if gpus else {}
        return _start(replica, arguments, own, listening)

    processes = [start(replica) for replica in state.all]
    try:
        server = Server(make_front(state, settings), listener, 2 * settings.max_open_requests)
        port = server.start()
        place = f"http://{settings.host}:{port}/v1"
        say(f"{settings.model_name}: {place}, {counted(replicas, 'replica')} are being started")
        _watch(state, processes, asked, start)
        server.announce_stop()
        statuses = _end(processes, settings.drain_seconds + GRACE_SECONDS if asked else 0.0)
        server.stop()
        return 0 if asked and not any(statuses) else max(1, *statuses)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        os.close(listening)
        os.close(writing)
        held.close()


def _gpus() -> list[str]:
    """The GPUs that processes of this machine may use; none where it has none."""
    if GPUS in os.environ:
        return [name for name in os.environ[GPUS].split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _start(
    replica: Replica, arguments: Sequence[str], environment: dict[str, str], listening: int
) -> Process:
    """Start a replica; what it says gets its number in front."""
    own = f"--data-parallel-size 1 --host {HOST} --port {replica.port}".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "helix_megatron.cli", "serve", *arguments, *own],
        env=os.environ | environment | {PARENT: str(listening)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(listening,),
        start_new_session=True,  # a terminal's Ctrl-C comes here only
        text=True,
        errors="replace",
    )

    def repeat() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            say(f"replica {replica.number}: {line.rstrip()}")

    threading.Thread(target=repeat, daemon=True).start()
    return process


def _watch(
    state: Replicas,
    processes: list[Process],
    asked: Sequence[int],
    start: Callable[[Replica], Process],
) -> None:
    """Keep each replica's state up to date, until a signal came, or none works and none will be started again.

    One that has taken requests and ends is started again, after a pause that doubles until it takes some. One
    that never did so has told why, and would again.

    Args:
        processes: of the replicas; those that are started again take their places.
    """
    pauses: dict[int, float] = {}  # of those that have taken requests
    due: dict[int, float] = {}
    complete = False
    while not asked and (due or any(process.poll() is None for process in processes)):
        now = time.monotonic()
        for number, replica in enumerate(state.all):
            if number in due:
                if now >= due[number]:
                    del due[number]
                    replica.restarts += 1
                    processes[number] = start(replica)
                continue
            before, replica.trouble = replica.trouble, _trouble(replica, processes[number])
            if not replica.trouble:
                pauses[number] = POLL_SECONDS
            elif not before:
                say(f"replica {number} takes no requests: {replica.trouble}")
            if number in pauses and processes[number].poll() is not None:
                pause = pauses[number]
                due[number], pauses[number] = now + pause, min(2 * pause, LONGEST_PAUSE)
                say(f"replica {number} will be started again in {pause:g} s")
        if not complete and len(state.able()) == len(processes):
            complete = True
            say(f"all {len(processes)} replicas take requests")
        time.sleep(POLL_SECONDS)


def _trouble(replica: Replica, process: Process) -> str:
    """Why a replica takes no requests; empty if it does."""
    status = process.poll()
    if status is not None:
        return f"it ended with status {status}."
    try:
        address = f"http://{HOST}:{replica.port}/health"
        urllib.request.urlopen(address, timeout=ANSWER_SECONDS).close()
        return ""
    except urllib.error.HTTPError as error:
        try:
            return str(json.loads(error.read())["error"]["message"])
        except (ValueError, KeyError):
            return f"its health is status {error.code}."
    except OSError:
        return "it does not answer."


def _end(processes: Sequence[Process], seconds: float) -> list[int]:
    """Ask the replicas to end, wait so long, and end those that have not; their statuses."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return [process.returncode for process in processes]
