"""The alternative for forks: a zero-context patch of lines of ours, for `git apply --unidiff-zero`.

The files in patches/ are what `patch_text` gives at the lines of the released versions.
"""

from __future__ import annotations

from pathlib import Path

from helix_megatron.megatron_lm.source import entry_point
from helix_megatron.megatron_lm.table import Version

SCRIPT = "pretrain_gpt.py"
INSTALL = "helix_megatron.megatron_lm.install()"
LINES = (
    "    import helix_megatron.megatron_lm  # flags, groups and attention of --intra-head-parallel-size",
    f"    {INSTALL}",
)
# Line of `if __name__ == "__main__":` in pretrain_gpt.py of the released versions.
ENTRY_POINTS: dict[Version, int] = {(0, 16): 329, (0, 17): 399, (0, 18): 382, (0, 19): 495}


def patch_text(line: int) -> str:
    """A patch that adds our lines below the given line of pretrain_gpt.py."""
    header = f"--- a/{SCRIPT}\n+++ b/{SCRIPT}\n@@ -{line},0 +{line + 1},{len(LINES)} @@\n"
    return header + "".join(f"+{added}\n" for added in LINES)


def patch_name(version: Version) -> str:
    return f"core_v{version[0]}.{version[1]}.patch"


def applied_at(script: Path) -> int | None:
    """The line of a script where Helix is installed, if it is patched."""
    for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() == INSTALL:
            return number
    return None


def state_of(checkout: Path, version: Version) -> tuple[bool, str]:
    """(whether the script is as it should be, what to say about its patch)."""
    script = checkout / SCRIPT
    if not script.is_file():
        return False, f"there is no {SCRIPT} in this checkout"
    entry, line = entry_point(script), applied_at(script)
    if entry is None:
        return False, f'{SCRIPT} has no `if __name__ == "__main__":` to put the lines under'
    if line is not None:
        if line == entry + len(LINES):
            return True, f"applied at line {line}"
        return False, (
            f"applied at line {line}, and the script begins to run at line {entry}. Move the lines to below "
            f"line {entry}"
        )
    if ENTRY_POINTS.get(version) == entry:
        return True, f"not applied; patches/{patch_name(version)} fits"
    return True, (
        f"not applied; none of the released ones fits, since the script begins to run at line {entry}. "
        "--patch prints one that does"
    )
