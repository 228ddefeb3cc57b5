"""Which tests run: always the quick tier; the full tier, or a part of it, when asked for.

The quick tier proves every property; the full tier proves it again over more cases, sizes and lengths, in named
parts. `./scripts/test.sh --full` runs all parts, `--full-part NAME` one. docs/testing.md says what each proves.

    @pytest.mark.full("training")            a test, or a case of one, that only runs with its part
    KILLS = sized("faults", full=20, quick=5)   a size that grows with it
"""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")

PARTS = ("attention", "training", "checkpoints", "conversion", "inference", "serving", "graph")
_chosen: set[str] = set()


def choose(parts: set[str]) -> None:
    """Run these parts of the full tier; called before test modules are imported."""
    unknown = parts - set(PARTS)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such part. Valid: {', '.join(PARTS)}.")
    _chosen.update(parts)


def is_full(part: str) -> bool:
    """Whether a part of the full tier runs."""
    assert part in PARTS, part
    return part in _chosen


def sized(part: str, *, full: T, quick: T) -> T:
    """One of two sizes of a test."""
    return full if is_full(part) else quick
