"""Replace attributes of other packages, all at once, and put every one of them back.

A `PatchTable` is a list of named replacements. Each is a function with a docstring that says what upstream
does, where, and why that fails; it takes the upstream object and returns what stands in for it:

    TABLE = PatchTable("torch", "the dummy streams")

    @TABLE.replace("torch.cuda:synchronize")
    def synchronize(upstream):
        \"\"\"p2p_communication.py:398 waits for the device: there is none.\"\"\"
        return lambda device=None: None

What only some versions of the package have is a row with `since=` and `before=`: there it is needed, and it is
not missed in the others.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.versions import TESTED, Version, found_version, numbers

_MISSING = object()


@contextlib.contextmanager
def temporarily(module: Any, **stand_ins: Any) -> Iterator[None]:
    """Attributes of a module are others inside the block, whether it has them or not."""
    upstream = {name: getattr(module, name, _MISSING) for name in stand_ins}
    vars(module).update(stand_ins)
    try:
        yield
    finally:
        for name, value in upstream.items():
            if value is _MISSING:
                delattr(module, name)
            else:
                setattr(module, name, value)


@dataclass(frozen=True, kw_only=True)
class Versioned:
    """A row of a table that holds for some versions of the package.

    `since` is the first version that has what is replaced, `before` the first that no longer has it.
    """

    since: Version = ()
    before: Version | None = None

    def applies_to(self, version: Version) -> bool:
        """Whether this version of the package has what the row replaces."""
        return self.since <= version and (self.before is None or version < self.before)


@dataclass(frozen=True)
class Patch(Versioned):
    """One attribute to replace.

    `target` is `module:attribute` or `module:Class.attribute`. `adds` marks an attribute that upstream
    forgot to define: it is added where it is missing and left alone where it exists.
    """

    target: str
    stand_in: Callable[[Any], Any]
    adds: bool = False


@dataclass(frozen=True)
class _Replaced:
    """One patch that is in place, with what it takes to undo it."""

    owner: Any
    name: str
    upstream: Any

    def undo(self) -> None:
        if self.upstream is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.upstream)


class PatchTable:
    """Replacements that are applied together or not at all.

    `package`, one of `versions.TESTED`, is what they replace parts of. `purpose` says in an error, after
    "which", who replaces a target that is not there.
    """

    def __init__(self, package: str, purpose: str) -> None:
        self.package = package
        self.purpose = purpose
        self.patches: list[Patch] = []
        self._replaced: list[_Replaced] = []

    @property
    def installed(self) -> bool:
        return bool(self._replaced)

    def replace(
        self,
        *targets: str,
        adds: bool = False,
        since: Version = (),
        before: Version | None = None,
    ) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
        """Decorator that adds a replacement of one or several targets to the table."""

        def register(stand_in: Callable[[Any], Any]) -> Callable[[Any], Any]:
            self.patches += [
                Patch(target, stand_in, adds, since=since, before=before) for target in targets
            ]
            return stand_in

        return register

    def fitting(self, version: Version | None = None) -> list[Patch]:
        """The patches for a version of the package; for the one in use by default."""
        if version is None:
            version = numbers(found_version(self.package) or "")
        return [patch for patch in self.patches if patch.applies_to(version)]

    def install(self) -> None:
        """Apply all patches for the version in use; nothing happens when they are in place.

        Raises `HelixError` if a target does not exist, before anything has been replaced.
        """
        if self.installed:
            return
        found = self.check()
        stand_ins = [
            (owner, name, upstream, patch.stand_in(upstream))
            for patch, owner, name, upstream in found
            if upstream is _MISSING or not patch.adds
        ]
        for owner, name, upstream, stand_in in stand_ins:
            # What a class only inherits is not its own: undoing means to delete it again.
            own = vars(owner).get(name, _MISSING) if isinstance(owner, type) else upstream
            setattr(owner, name, stand_in)
            self._replaced.append(_Replaced(owner, name, own))

    def check(self) -> list[tuple[Patch, Any, str, Any]]:
        """What the patches for the version in use find, and replace nothing; as `_find` for each.

        Raises `HelixError` if a target does not exist.
        """
        return [(patch, *self._find(patch)) for patch in self.fitting()]

    def uninstall(self) -> None:
        """Put everything back, last patch first."""
        while self._replaced:
            self._replaced.pop().undo()

    def _find(self, patch: Patch) -> tuple[Any, str, Any]:
        """(object that holds the target, attribute's name, the attribute or `_MISSING`)."""
        module, _, path = patch.target.partition(":")
        *parents, name = path.split(".")
        try:
            owner = importlib.import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
        except (ImportError, AttributeError) as error:
            raise self._unknown_version(patch) from error
        upstream = getattr(owner, name, _MISSING)
        if upstream is _MISSING and not patch.adds:
            raise self._unknown_version(patch)
        return owner, name, upstream

    def _unknown_version(self, patch: Patch) -> HelixError:
        version = found_version(self.package) or "of an unknown version"
        tested = TESTED[self.package]
        return HelixError(
            f"{self.package} {version} has no {patch.target.replace(':', '.')}, which "
            f"{self.purpose} replaces. It is written for {self.package} {tested.lowest} to "
            f"{tested.newest}: try pip install '{tested.requirement}'."
        )
