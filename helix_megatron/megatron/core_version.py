"""Which megatron-core is in use, and which versions this package knows."""

from __future__ import annotations

import importlib

from helix_megatron.errors import HelixError

Version = tuple[int, ...]
SUPPORTED = ">=0.16.1,<0.20"
"""The releases of megatron-core that the tests run with, as setup.py requires them."""


def dotted(version: Version) -> str:
    """`0.16` for (0, 16)."""
    return ".".join(map(str, version))


def found_version() -> Version:
    """(major, minor, patch) of the megatron.core that Python finds first, be it installed or a checkout.

    Raises:
        HelixError: there is none.
    """
    try:
        package = importlib.import_module("megatron.core.package_info")
        return package.MAJOR, package.MINOR, package.PATCH
    except (ImportError, AttributeError) as error:
        raise HelixError(
            "no megatron.core can be imported that says its version. Give the path of a script in a "
            "Megatron-LM checkout, or put a checkout on PYTHONPATH."
        ) from error


def found_core() -> str:
    """The megatron.core in use and where it is, for messages."""
    package = importlib.import_module("megatron.core.package_info")
    return f"megatron.core {dotted(found_version())} at {package.__file__}"
