"""JSON that says where, when and by which command its numbers were made."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
from collections.abc import Sequence
from typing import Any

from helix_megatron import __version__
from helix_megatron.outputs import write_text
from helix_megatron.versions import found_version

PROGRAM = "python -m helix_megatron.bench"


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
    write_text(path, json.dumps(document, indent=2) + "\n")
