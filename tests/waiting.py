"""Waits of tests: for events, not for seconds.

A limit only ends a hang, so it is generous: with a hundred times its load a machine is slower, and green.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LIMIT = 300.0  # seconds, also for clients, sockets and short programs
PROGRAM_LIMIT = 600.0  # seconds for programs that import torch, on several ranks


def wait_until(condition: Callable[[], T], what: str, limit: float = LIMIT) -> T:
    """Wait until a condition is true; its value. `what` says which, for the one who looks at a hang."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"Waited {limit:g} s in vain until {what}.")
        time.sleep(0.01)
    return value


def run_python(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Python with this package, in a process of its own: its status, and all that it prints."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "120"},
        timeout=PROGRAM_LIMIT,
        check=False,
    )


HEAVY = {"torch", "megatron", "deepspeed", "transformers", "accelerate"}


def printed_afresh(program: str) -> list[str]:
    """The lines that a program prints in an interpreter of its own; the last lists the heavy packages in it."""
    run = run_python(["-c", f"{program}\nimport sys\nprint(sorted({HEAVY} & set(sys.modules)))"])
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()
