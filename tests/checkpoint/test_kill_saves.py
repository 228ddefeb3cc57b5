"""A process killed with SIGKILL while it saves leaves the old checkpoint or the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import sized
from waiting import PROGRAM_LIMIT

KILLS = sized("checkpoints", full=20, quick=3)


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["synchronous", "asynchronous"])
def test_a_kill_at_any_moment_loses_nothing(tmp_path, flags):
    """Kills at random moments of saves that follow each other without a pause: every store is readable."""
    script = Path(__file__).parents[1] / "kill_saves.py"
    command = [sys.executable, str(script), str(tmp_path / "store"), str(KILLS), "1", *flags]
    (tmp_path / "store").mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PROGRAM_LIMIT, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trials = json.loads(done.stdout.splitlines()[-1])
    assert len(trials) == KILLS
    assert all(trial["killed"] for trial in trials)
    for trial in trials:
        # What a finished save reported is never lost; one more may have been completed unreported.
        least = trial["reported"] - (1 if flags else 0)  # the last one may still be under way
        assert least <= trial["found"] <= trial["reported"] + 1
        assert trial["found"] > trial["before"]
    unfinished = [trial for trial in trials if any(".saving-" in name for name in trial["left"])]
    assert unfinished, "some kill must have fallen into a save"
