"""Files that nobody vouches for are read, or refused in a sentence: a short run of `fuzz_readers.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiers import sized
from waiting import PROGRAM_LIMIT

TESTS = Path(__file__).parent
CASES = sized("checkpoints", full=100, quick=8)


def test_every_reader_reads_or_refuses():
    """In a process of its own, whose memory and time are measured, and which a hang would end."""
    command = [sys.executable, str(TESTS / "fuzz_readers.py"), "--cases", str(CASES)]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=10 * PROGRAM_LIMIT,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr[-3000:]}"
    assert run.stdout.count(" 0 faults ") == 19, run.stdout
    assert run.stdout.count(" read, 0 refused") <= 1, (
        "nothing was damaged"
    )  # a pointer may be wrong
