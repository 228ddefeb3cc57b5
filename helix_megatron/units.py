"""Numbers as people read them: `10.2k`, `412 MiB`, `1:02:03`."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """A count with three significant digits: `950`, `10.2k`, `1.25M`."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def size(value: float) -> str:
    """Bytes in binary units: `412 MiB`, `1.25 GiB`."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def duration(seconds: float) -> str:
    """Seconds as `0:12` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return str(value)
    power = 0
    # 999.6 would round to 1000, which already belongs to the next unit.
    while abs(value) >= base - 0.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    whole = power == 0 and value == int(value)
    decimals = 0 if whole or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{decimals}f}{units[power]}"
