"""Whether the installed megatron-core has what Helix replaces of it."""

from __future__ import annotations

import torch

from helix_megatron.errors import HelixError
from helix_megatron.megatron import cpu_runtime, torch_adam
from helix_megatron.patching import PatchTable


def check() -> list[str]:
    """A sentence for each table of replacements that does not fit; the CPU runtime counts without CUDA only."""
    tables: list[PatchTable] = [torch_adam.TABLE]
    if not torch.cuda.is_available():
        tables.append(cpu_runtime.TABLE)
    problems = []
    for table in tables:
        try:
            table.check()
        except HelixError as error:
            problems.append(str(error))
    return problems
