"""Hooks into Megatron-LM: a `PatchTable` whose patches have names and version ranges.

Each hook is a function with a docstring: the first line says what changes, the rest why. It takes upstream's
object and returns what stands in for it. Undoing is the same for all: `uninstall` puts upstream's object back.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.patching import Patch, PatchTable, Versioned
from helix_megatron.versions import Version, dotted

OLDEST: Version = (0, 16)
NEWEST: Version = (0, 20)
"""Range of megatron.core's (major, minor) for which the hooks were written; 0.20 is the main branch."""
KNOWN = f"{dotted(OLDEST)} to {dotted(NEWEST)}"


def found_version() -> Version:
    """(major, minor, patch) of the megatron.core that Python finds first, be it installed or a checkout."""
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


@dataclass(frozen=True)
class Hook(Versioned):
    """A named unit of one or several replacements.

    Args:
        name: a short name, for people.
        targets: `module:attribute` or `module:Class.attribute`, all replaced alike.
        stand_in: makes the replacement from upstream's object.
    """

    name: str
    targets: tuple[str, ...]
    stand_in: Callable[[Any], Any]

    @property
    def change(self) -> str:
        """What changes, in a line."""
        return (inspect.getdoc(self.stand_in) or "").partition("\n")[0]

    @property
    def range(self) -> str:
        """The versions that have the targets, such as `0.16 to 0.17`."""
        if self.before is None:
            return f"{dotted(self.since)} and later"
        newest = (self.before[0], self.before[1] - 1)
        return (
            dotted(self.since)
            if newest == self.since
            else f"{dotted(self.since)} to {dotted(newest)}"
        )


class HookTable(PatchTable):
    """Hooks that are applied together or not at all."""

    def __init__(self, purpose: str) -> None:
        super().__init__("megatron-core", purpose)
        self.hooks: list[Hook] = []

    def hook(
        self, name: str, *targets: str, since: Version = OLDEST, before: Version | None = None
    ) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
        """Decorator that adds a hook to the table."""

        def register(stand_in: Callable[[Any], Any]) -> Callable[[Any], Any]:
            assert inspect.getdoc(stand_in), f"hook {name} says nothing about itself"
            self.hooks.append(Hook(name, targets, stand_in, since=since, before=before))
            return self.replace(*targets, since=since, before=before)(stand_in)

        return register

    def install(self) -> None:
        """Apply the hooks of the core that is found; nothing happens when they are in place.

        Raises:
            HelixError: there is no Megatron-LM, it is older than the hooks, or it lacks what one of them
                replaces. Nothing is replaced then.
        """
        if self.installed:
            return
        version = found_version()
        if version[:2] < OLDEST:
            raise HelixError(
                f"{found_core()} is older than what {self.purpose} know. Known: {KNOWN}. Check out "
                "core_v0.16.1 or later."
            )
        if version[:2] > NEWEST:
            warnings.warn(
                f"{found_core()} is newer than what {self.purpose} know ({KNOWN}). They are applied "
                "as they are.",
                stacklevel=2,
            )
        super().install()

    def _find(self, patch: Patch) -> tuple[Any, str, Any]:
        try:
            return super()._find(patch)
        except HelixError as error:
            if isinstance(error.__cause__, ImportError):
                raise HelixError(f"{error} ({error.__cause__})") from error.__cause__
            raise

    def _unknown_version(self, patch: Patch) -> HelixError:
        return HelixError(
            f"{found_core()} has no {patch.target.replace(':', '.')}, which {self.purpose} replace. They are "
            f"written for megatron.core {KNOWN}: see docs/megatron-lm.md, and `helix doctor "
            "--megatron PATH` for what fits."
        )
