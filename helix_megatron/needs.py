"""What a host package must offer for Helix to work with it, stated as data and checked without running it.

Each host lists what it takes from its package and what breaks without it. `helix doctor` prints what is unmet;
the host itself raises it before it changes a model.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from helix_megatron.versions import TESTED, found_version

_MISSING: Any = object()


@dataclass(frozen=True)
class Need:
    """One thing that Helix takes from a package.

    target: `module:attribute`, or `module:Class.attribute`.
    without: what goes wrong if it is not there, as a sentence's beginning: "norms of gradients are wrong".
    parameters: names that it must take, if it is a function.
    """

    target: str
    without: str
    parameters: tuple[str, ...] = ()


def unmet(package: str, needs: Iterable[Need]) -> list[str]:
    """A sentence for each need that the installed package does not meet; none when all is well."""
    return [
        sentence(package, what, need.without) for need in needs if (what := _lack(need)) is not None
    ]


def sentence(package: str, what: str, without: str) -> str:
    """What is missing, what it breaks, and what to do. `package` is one of `versions.TESTED`."""
    version, tested = found_version(package) or "of an unknown version", TESTED[package]
    return (
        f"{package} {version} has {what}: {without}. Helix is tested with {package} {tested.lowest} to "
        f"{tested.newest}; try pip install '{tested.requirement}'."
    )


def _lack(need: Need) -> str | None:
    """What is missing, after "has"; None if nothing is."""
    module, _, path = need.target.partition(":")
    name = f"{module}.{path}"
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        return f"no {name} ({error})"
    for attribute in path.split("."):
        found = getattr(found, attribute, _MISSING)
        if found is _MISSING:
            return f"no {name}"
    if not need.parameters:
        return None
    taken = inspect.signature(found).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        return None
    lacking = [parameter for parameter in need.parameters if parameter not in taken]
    return f"a {name} that does not take {', '.join(lacking)}" if lacking else None
