"""When a rank dies or hangs, every other rank ends soon, and says which rank and which collective.

Each rank has a thread that tells the rendezvous store once a second that it lives and what it does, and reads
the same of the others. It ends this process when another rank has ended without a word, when a launcher asks
to terminate, or when a collective fails; in each case with one paragraph on standard error. The thread can
speak while the main thread is blocked inside a collective.
"""

from __future__ import annotations

import contextlib
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
from typing import Any

import psutil
import torch.distributed as dist

from helix_megatron.observe import Call, observing

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 30.0  # a rank on another host that says nothing for so long is gone
COLLECTIVE_FAILURE = re.compile(
    r"gloo|Connection|closed by peer|[Tt]imed? ?out|NCCL|ProcessGroup|Broken pipe", re.ASCII
)


class Watchdog:
    """One rank's watch over the others.

    Args:
        store: a rendezvous store that this thread may use beside the main one.
        rank, world_size: of this process.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world = store, rank, world_size
        self._last = "no collective yet"
        self._since = time.time()
        self._ended = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}
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
        self._say({"state": "done"})
        self._thread.join(timeout=5 * BEAT_SECONDS)
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGTERM, self._old_handler)

    def fail(self, reason: str, status: int = 1) -> None:
        """Say why, and end this process without waiting for anybody."""
        with self._lock:
            self._ended.set()
            with contextlib.suppress(Exception):
                self._say({"state": "left"})
            print(self._message(reason), file=sys.stderr, flush=True)
            os._exit(status)

    # --------------------------------------------------------------------- thread

    def _watch(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select([self._reader], [], [], BEAT_SECONDS)
            if ready and signal.SIGTERM in self._reader.recv(64):
                self.fail("it was asked to terminate", 128 + signal.SIGTERM)
            try:
                self._say({"state": "alive"})
                gone = self._gone()
            except Exception as error:
                if not self._ended.is_set():
                    self.fail(f"the rendezvous store does not answer ({type(error).__name__})")
                return
            if gone and not self._ended.wait(BEAT_SECONDS):
                # The main thread has had a moment to see its collective fail and to say so itself.
                self.fail("another rank is gone")

    def _say(self, word: dict[str, Any]) -> None:
        word |= {"host": socket.gethostname(), "pid": os.getpid(), "beat": time.time()}
        word |= {"in": self._last, "since": self._since}
        self._store.set(f"helix/watchdog/{self._rank}", json.dumps(word))

    def _words(self) -> dict[int, dict[str, Any]]:
        """The last word of every rank that has spoken."""
        keys = [f"helix/watchdog/{rank}" for rank in range(self._world)]
        return {
            rank: json.loads(self._store.get(key))
            for rank, key in enumerate(keys)
            if self._store.check([key])
        }

    def _gone(self) -> list[int]:
        """Ranks that ended without a word."""
        gone = []
        for rank, word in self._words().items():
            if rank == self._rank or word["state"] != "alive":
                continue
            if word["host"] == socket.gethostname():
                ended = not _lives(word["pid"])
            else:
                beat, when = self._seen.get(rank, ("", 0.0))
                if beat != word["beat"]:
                    self._seen[rank] = (word["beat"], time.monotonic())
                    continue
                ended = time.monotonic() - when > SILENCE_SECONDS
            if ended:
                gone.append(rank)
        return gone

    def _message(self, reason: str) -> str:
        here = f"rank {self._rank}"
        text = f"{here} ends: {reason}. Its last collective: {self._last}, {_ago(self._since)}."
        try:
            gone, words = self._gone(), self._words()
        except Exception:
            return text + " The rendezvous store cannot be asked about the other ranks."
        for rank in gone:
            word = words[rank]
            text += (
                f" Rank {rank} (process {word['pid']} on {word['host']}) ended without a word; its last "
                f"collective: {word['in']}."
            )
        if not gone:
            elsewhere = {
                rank: word
                for rank, word in words.items()
                if rank != self._rank and word["in"] != self._last and word["state"] == "alive"
            }
            for rank, word in elsewhere.items():
                text += f" Rank {rank} is elsewhere: {word['in']}, {_ago(word['since'])}."
        return text


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Watch the other ranks inside the block. A single process has nobody to watch."""
    if dist.get_world_size() == 1:
        yield
        return
    store: Any = dist.distributed_c10d._get_default_store()
    store = store.clone()  # its own connection: the main one may be blocked
    watchdog = Watchdog(store, dist.get_rank(), dist.get_world_size())
    with observing(watchdog):
        watchdog.start()
        try:
            yield
        except RuntimeError as error:
            if COLLECTIVE_FAILURE.search(str(error)):
                first_line = str(error).strip().splitlines()[0]
                watchdog.fail(f"a collective failed ({first_line})")
            raise
        watchdog.stop()


def _lives(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _ago(when: float) -> str:
    return f"started {max(0.0, time.time() - when):.1f} s ago"
