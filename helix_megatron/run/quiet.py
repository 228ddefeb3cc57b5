"""What a command does not print of the packages that it runs."""

from __future__ import annotations

import warnings


def ignore_megatron_warnings() -> None:
    """Those of packages that it could use, of settings for GPUs, of old names of torch's functions.

    Every rank would print them.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
