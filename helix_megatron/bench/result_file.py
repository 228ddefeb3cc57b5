"""JSON that says where, when and by which command its numbers were made."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helix_megatron import __version__
from helix_megatron.errors import HelixError
from helix_megatron.versions import found_version

PROGRAM = "python -m helix_megatron.bench"


def check_output(flag: str, path: Path | str | None) -> None:
    """Find out before a long measurement that its result could not be written.

    Raises:
        HelixError: the directory does not exist or cannot be written to.
    """
    if path is None:
        return
    directory = Path(path).parent
    if not directory.is_dir() or not os.access(directory, os.W_OK) or Path(path).is_dir():
        raise HelixError(
            f"{flag} {path} cannot be written: {directory} is no directory that can be written to, or the path "
            "is a directory itself. Give a file in a directory that exists."
        )


def write_json(path: str | None, arguments: Sequence[str], results: Any) -> None:
    """`results` under the circumstances of the measurement; nothing without a path."""
    if path is None:
        return
    document = {
        "command": shlex.join([*PROGRAM.split(), *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "helix_megatron": __version__,
            "python": platform.python_version(),
            **{name: found_version(name) for name in ("torch", "megatron-core")},
        },
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cpu_cores": os.cpu_count(),
            "load_average_at_the_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "results": results,
    }
    Path(path).write_text(json.dumps(document, indent=2) + "\n")
