"""A runner that gives mutations of a valid file to a reader: for `fuzz_readers.py`.

A reader may do two things with a file that nobody vouches for: read it, or say in one sentence what is wrong.
A case fails where it does a third: another exception, more than `SECONDS` of a processor, a wait without end,
more than `MEGABYTES` of memory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutations import Mutated

from helix_megatron.errors import HelixError

SECONDS = 5.0
WAIT_SECONDS = 30.0  # only ends a hang that no processor sees: of a pipe, of a lock
MEGABYTES = 500
BATCH = 200


@dataclass(frozen=True)
class Reader:
    """A reader, and a valid file that is mutated.

    Args:
        make: writes what is read to a folder, once.
        target: the file in it that is mutated.
        mutated: of its content.
        read: reads the folder. What it raises besides HelixError, or one of `documented`, is a fault.
        prepare: called with the folder after a mutation, to make what depends on the file's content agree.
    """

    make: Callable[[Path], object]
    target: str
    mutated: Callable[[bytes], Mutated]
    read: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda folder: None
    documented: tuple[type[BaseException], ...] = ()


@dataclass
class Outcome:
    """What a reader did with so many files: how many it read, how many it refused, and the faults."""

    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    largest: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[bytes | str, str]] = field(default_factory=dict)

    def summary(self) -> str:
        """A line for people."""
        return (
            f"{self.read + self.refused + self.faults.total():,} files in {self.seconds / 60:.1f} min: "
            f"{self.read:,} read, {self.refused:,} refused, {self.faults.total():,} faults of "
            f"{len(self.faults)} kinds; slowest {self.slowest:.2f} s, largest {self.largest:.0f} MB"
        )

    def report(self, name: str, findings: Path | None, verbose: bool) -> None:
        """Print it, and keep the first file of each kind of fault."""
        print(f"{name}: {self.summary()}", flush=True)
        for kind, count in self.refusals.most_common(12 if verbose else 0):
            print(f"  {count} refused: {kind}", flush=True)
        for number, (kind, count) in enumerate(self.faults.most_common()):
            what, text = self.examples[kind]
            print(f"  {count} × {kind}\n{text}", flush=True)
            if findings:
                findings.mkdir(parents=True, exist_ok=True)
                path = findings / f"{name.replace(' ', '-')}-{number}"
                path.with_name(f"{path.name}.txt").write_text(f"{kind}\n{text}")
                path.write_bytes(what if isinstance(what, bytes) else what.encode())


class TooLong(BaseException):
    """The time of a case is over."""


# What stands in the place of a file.
THINGS = ("pipe", "endless", "folder", "itself", "nothing", "dangling")


def put(path: Path, what: bytes | str) -> None:
    """Bytes, or one of `THINGS`, in the place of a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what != "nothing":
        path.symlink_to({"endless": "/dev/zero", "itself": path.name, "dangling": "nowhere"}[what])


def fuzz(reader: Reader, folder: Path, *, cases: int, minutes: float, start: int = 0) -> Outcome:
    """Give a reader so many mutated files, or as many as there is time for."""
    reader.make(folder)
    path, outcome = folder / reader.target, Outcome()
    content = path.read_bytes()
    reader.prepare(folder)
    reader.read(folder)  # the valid file
    limit_memory()
    inputs = st.integers(0, 99).flatmap(
        lambda number: st.sampled_from(THINGS) if number < 2 else reader.mutated(content)
    )
    begun, done = time.monotonic(), 0
    while done < cases and time.monotonic() - begun < 60 * minutes:

        @seed(start + done)
        @settings(
            max_examples=min(BATCH, cases - done),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def give(what: bytes | str) -> None:
            if time.monotonic() - begun < 60 * minutes:
                put(path, what)
                _case(reader, folder, what, outcome)

        give()
        done += BATCH
        outcome.seconds = time.monotonic() - begun
    put(path, content)
    return outcome


def _case(reader: Reader, folder: Path, what: bytes | str, outcome: Outcome) -> None:
    problem = text = ""
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.monotonic(), time.process_time()
    try:
        with _limited():
            if isinstance(what, bytes):
                reader.prepare(folder)
            reader.read(folder)
        outcome.read += 1
    except (HelixError, *reader.documented) as error:
        outcome.refused += 1
        outcome.refusals[_kind(str(error), folder)] += 1
        if len(str(error)) > 5000:
            problem = f"a sentence of thousands of characters: {_where(error)}"
            text = traceback.format_exc(limit=-3)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem, text = _where(error), traceback.format_exc()
    seconds = min(time.monotonic() - start[0], time.process_time() - start[1])
    grown = (_memory("VmHWM") - before) / 1e6
    outcome.slowest, outcome.largest = max(outcome.slowest, seconds), max(outcome.largest, grown)
    if not problem and seconds > SECONDS:
        problem = "took too long"
    if not problem and grown > MEGABYTES:
        problem = "took too much memory"
    if problem:
        outcome.faults[problem] += 1
        outcome.examples.setdefault(problem, (what, text))


def _kind(sentence: str, folder: Path) -> str:
    """The same for sentences that differ in names and numbers only."""
    return re.sub(r"\d+|'.*'", "…", sentence.replace(str(folder), ""))[:80]


def _where(error: BaseException) -> str:
    """The kind of an exception: its type, and the last line of this package on its way."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "helix_megatron/" in f.filename and "fuzz" not in f.filename]
    last = own[-1] if own else frames[-1]
    name = last.filename.rpartition("helix_megatron/")[2]
    return f"{type(error).__name__} in {name}:{last.lineno} ({last.line})"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Ends a loop, and a wait, that last too long."""

    def end(*_: object) -> None:
        raise TooLong

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
        (signal.SIGALRM, signal.ITIMER_REAL, WAIT_SECONDS),
    )
    faulthandler.dump_traceback_later(3 * WAIT_SECONDS, exit=True)  # where no signal is heard
    for number, timer, seconds in timers:
        signal.signal(number, end)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)
        faulthandler.cancel_dump_traceback_later()


def limit_memory(gigabytes: float = 4.0) -> None:
    """Above what the process has: an allocation without bounds fails here, and not the machine."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(_memory("VmSize") + gigabytes * 1e9), most))


def _memory(name: str) -> int:
    """Bytes, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(name)
