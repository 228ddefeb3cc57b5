"""When a rank dies or hangs, every other rank ends soon, and says which rank and which collective.

Each rank has a thread that tells the rendezvous store once a second that it lives and what it does, and reads
the same of the others. It ends this process when another rank has ended without a word, when a launcher asks
to terminate, or when a collective fails; in each case with one paragraph on standard error. The thread can
speak while the main thread is blocked inside a collective.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from helix_megatron.core.observe import Call, observing

BEAT_SECONDS = 1.0
SAME_SIGNAL_SECONDS = 5.0
BOOT_ID = "/proc/sys/kernel/random/boot_id"
FIRST_BEATS_SECONDS = 0.05  # until every rank has been heard once
DYING_SECONDS = 10.0  # a process closes its connections a little before it is gone
QUIET_SECONDS = 5.0  # a rank that says nothing for so long is stopped, or its machine is overloaded
SILENCE_SECONDS = 30.0  # a rank on another host that says nothing for so long is gone
COLLECTIVE_FAILURE = re.compile(
    r"gloo|Connection|closed by peer|[Tt]imed? ?out|NCCL|ProcessGroup|Broken pipe", re.ASCII
)
TIMEOUT = re.compile(r"[Tt]imed? ?out")


class Watchdog:
    """One rank's watch over the others.

    Args:
        store: a rendezvous store that this thread may use beside the main one.
        rank, world_size: of this process.
        asked_to_end: set when a launcher asks to terminate; then the run has to end by itself. None: this
            process is ended at once.
        farewell: called with the reason before this process is ended, from any thread.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        asked_to_end: threading.Event | None = None,
        farewell: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._farewell = farewell
        self._asked_at = 0.0
        self._store, self._rank, self._world = store, rank, world_size
        self._asked_to_end = asked_to_end
        self._last = "no collective yet"
        self._since = time.time()
        self._ended = threading.Event()
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}
        self._lock = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="helix-watchdog", daemon=True)

    # ------------------------------------------------------------ as an observer

    def around(self, call: Call, run: Callable[[], Any]) -> Any:
        """Remember the collective that this rank is in."""
        ranks = dist.get_process_group_ranks(call.group)
        self._last, self._since = (
            f"{call.collective} ({call.purpose}) among ranks {ranks}",
            time.time(),
        )
        return run()

    # ------------------------------------------------------------------- lifetime

    def start(self) -> None:
        self._writer.setblocking(False)
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
        # The interpreter writes a byte here at once, even while the main thread is blocked in C.
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._say({"state": "alive"})
        self._thread.start()

    def stop(self) -> None:
        """End of a run that went well."""
        self._ended.set()
        self._writer.send(b"\0")  # wakes the thread
        self._thread.join(timeout=30 * BEAT_SECONDS)
        self._say({"state": "done"})
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGTERM, self._old_handler)
        self._reader.close()
        self._writer.close()

    def await_gone(self, seconds: float) -> None:
        """Wait, not longer than so many seconds, until the end of some other rank can be seen."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._gone():
            with contextlib.suppress(Exception):
                self._listen()
            if any(word["state"] != "alive" for word, _ in list(self._heard.values())):
                return
            time.sleep(0.05)

    def fail(self, reason: str, status: int = 1) -> None:
        """Say why, and end this process without waiting for anybody."""
        with self._lock:
            self._ended.set()
            with contextlib.suppress(Exception):
                self._say({"state": "left"})
            message = self._message(reason)
            print(message, file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                self._farewell(message)
            os._exit(status)

    # --------------------------------------------------------------------- thread

    def _watch(self) -> None:
        while not self._ended.is_set():
            beat = BEAT_SECONDS if len(self._heard) == self._world else FIRST_BEATS_SECONDS
            ready, _, _ = select.select([self._reader], [], [], beat)
            if self._ended.is_set():
                return
            if ready and signal.SIGTERM in self._reader.recv(64):
                asked = self._asked_to_end
                if asked is None or (asked.is_set() and not _one_wish(self._asked_at)):
                    self.fail("it was asked to terminate", 128 + signal.SIGTERM)
                elif not asked.is_set():
                    self._asked_at = time.monotonic()
                    asked.set()
            try:
                self._say({"state": "alive"})
                self._listen()
                gone = self._gone()
            except Exception as error:
                self.await_gone(DYING_SECONDS)  # who kept it, most likely
                if not self._ended.is_set():
                    self.fail(f"the rendezvous store does not answer ({type(error).__name__})")
                return
            if gone and not self._ended.wait(BEAT_SECONDS):
                # The main thread has had a moment to see its collective fail and to say so itself.
                self.fail("another rank is gone")

    def _say(self, word: dict[str, Any]) -> None:
        word |= {"host": socket.gethostname(), "beat": time.time(), **_this_process()}
        word |= {"in": self._last, "since": self._since}
        self._store.set(f"helix/watchdog/{self._rank}", json.dumps(word))

    def _listen(self) -> None:
        """Hear the last word of every rank that has spoken, and note when it was new (on this host's clock)."""
        for rank in range(self._world):
            key = f"helix/watchdog/{rank}"
            if not self._store.check([key]):
                continue
            word = json.loads(self._store.get(key))
            before, _ = self._heard.get(rank, ({}, 0.0))
            if word["beat"] != before.get("beat"):
                self._heard[rank] = word, time.monotonic()

    def _others(self) -> Iterator[tuple[int, dict[str, Any], float]]:
        """(rank, last word, seconds since it) of the ranks that have not taken leave."""
        for rank, (word, when) in sorted(self._heard.items()):
            if rank != self._rank and word["state"] == "alive":
                yield rank, word, time.monotonic() - when

    def _gone(self) -> list[int]:
        """Ranks that ended without a word, as far as has been heard."""
        here = _this_process()["machine"]
        return [
            rank
            for rank, word, silence in self._others()
            if (not _lives(word) if word["machine"] == here else silence > SILENCE_SECONDS)
        ]

    def _message(self, reason: str) -> str:
        text = f"rank {self._rank} ends: {reason}. Its last collective: {self._last}, {_ago(self._since)}."
        try:
            self._listen()
        except Exception:
            text += " The rendezvous store does not answer any more; what it last said:"
        gone = self._gone()
        for rank, word, silence in self._others():
            name = f" Rank {rank} (process {word['pid']} on {word['host']})"
            if rank in gone:
                text += f"{name} ended without a word; its last collective: {word['in']}."
            elif silence > QUIET_SECONDS:
                text += f"{name} has been silent for {silence:.0f} s; its last collective: {word['in']}."
            elif not gone and word["in"] != self._last:
                text += f" Rank {rank} is elsewhere: {word['in']}, {_ago(word['since'])}."
        return text


@contextlib.contextmanager
def watching(
    asked_to_end: threading.Event | None = None,
    farewell: Callable[[str], None] = lambda reason: None,
) -> Iterator[None]:
    """Watch the other ranks inside the block. A single process has nobody to watch.

    Args:
        asked_to_end: set by SIGTERM, which otherwise ends the process. A second SIGTERM, 5 s later or
            more, ends it anyway.
        farewell: called with the reason where the watch ends this process.
    """
    if dist.get_world_size() == 1:
        with _setting(asked_to_end):
            yield
        return
    store: Any = dist.distributed_c10d._get_default_store()
    store = store.clone()  # its own connection: the main one may be blocked
    watchdog = Watchdog(store, dist.get_rank(), dist.get_world_size(), asked_to_end, farewell)
    with observing(watchdog):
        watchdog.start()
        try:
            yield
        except RuntimeError as error:
            if COLLECTIVE_FAILURE.search(str(error)):
                if not TIMEOUT.search(str(error)):
                    watchdog.await_gone(DYING_SECONDS)
                first_line = str(error).strip().splitlines()[0]
                watchdog.fail(f"a collective failed ({first_line})")
            raise
        watchdog.stop()


@contextlib.contextmanager
def _setting(asked_to_end: threading.Event | None) -> Iterator[None]:
    """SIGTERM sets the event inside the block; a second one ends the process, as without the block."""
    if asked_to_end is None:
        yield
        return
    event = asked_to_end

    asked_at: list[float] = []

    def handle(*_: object) -> None:
        if not asked_at:
            asked_at.append(time.monotonic())
            event.set()
        elif not _one_wish(asked_at[0]):
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@functools.cache
def _this_process() -> dict[str, Any]:
    """Its number, when it was started, and the machine on which that number means something.

    Containers of one host may have its name and process numbers of their own.
    """
    process = psutil.Process()
    machine = socket.gethostname()
    with contextlib.suppress(OSError):  # not on Linux
        machine += os.readlink("/proc/self/ns/pid") + Path(BOOT_ID).read_text()
    return {"pid": process.pid, "started": process.create_time(), "machine": machine}


def _lives(word: dict[str, Any]) -> bool:
    """Whether the process of this machine that sent a word runs; a zombie does not."""
    try:
        process = psutil.Process(word["pid"])
        started = abs(process.create_time() - word["started"]) < 1.0
        return started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.AccessDenied, OSError):  # it cannot be looked at, which says nothing about it
        return True


def _one_wish(since: float) -> bool:
    """Whether a signal belongs to one that came before.

    systemd and Slurm send it to every process of a service, and a launcher passes its own on.
    """
    return time.monotonic() - since < SAME_SIGNAL_SECONDS


def _ago(when: float) -> str:
    return f"started {max(0.0, time.time() - when):.1f} s ago"
